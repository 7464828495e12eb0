"""A tiny random model of every family, with the results of transformers and of workers under many
layouts.
"""

import itertools
import json
import re
from pathlib import Path

import megatron_cases as cases
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors.torch import load_file, save_file

from spark_nemo.config import MegatronConfig, WeightSyncConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.sglang import SglangServer
from spark_nemo.megatron.process_groups import gather_objects
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.models.param_mapping import map_params
from spark_nemo.weight_sync.sync_plan import plan_sync
from spark_nemo.weight_sync.synchronizer import WeightSync

SIZES = {
    "vocab_size": cases.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
# Of head_dim 8, one frequency stays, one is mixed and two are stretched; 512 instead of Megatron's
# built-in 8192.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 40.0,
    "original_max_position_embeddings": 512,
}
FAMILIES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "tie_word_embeddings": False,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
}
LAYOUTS = {f"tp{tp}_pp{pp}": (tp, pp) for tp, pp in ((2, 1), (1, 2), (2, 2), (4, 2))}
EXPERT_LAYOUTS = {"pp2_ep2": (1, 2, 2), "tp2_ep2": (2, 1, 2), "tp2_pp2_ep4": (2, 2, 4)}


def make_hf(family, folder, **changes):
    """Save a float32 model with random norms, biases and router in ``folder`` and return it."""
    import transformers

    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("mlp.gate.weight"):
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def write_reference(family, folder, **changes):
    """Save the model, a bfloat16 copy in ``folder/bf16``, and transformers' log-probabilities, loss
    and gradients.
    """
    folder, sequences = Path(folder), cases.make_sequences()
    model = make_hf(family, folder, **changes)
    loss = cases.hf_loss(model, sequences)
    loss.backward()
    torch.save(
        {
            "logprobs": [cases.hf_logprobs(model, s).detach() for s in sequences],
            "loss": loss.item(),
            "grads": dict(_file_names(model)),
        },
        folder / "reference.pt",
    )
    (folder / "bf16").mkdir()
    (folder / "bf16" / "config.json").write_text((folder / "config.json").read_text())
    save_file(
        {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()},
        folder / "bf16" / "model.safetensors",
    )


def _file_names(model):
    """Yield gradients under the checkpoint's names, where every expert has its own tensors."""
    for name, parameter in model.named_parameters():
        grad = parameter.grad.clone()
        stem, _, which = name.rpartition(".experts.")
        for expert in range(grad.shape[0]) if stem else ():
            if which == "down_proj":
                yield f"{stem}.experts.{expert}.down_proj.weight", grad[expert]
            else:
                yield from zip(
                    (f"{stem}.experts.{expert}.{x}_proj.weight" for x in ("gate", "up")),
                    grad[expert].chunk(2),
                )
        if not stem:
            yield name, grad


def compare(folder, layout):
    """Return the largest absolute differences to transformers' results, the same on every rank."""
    folder, sequences = Path(folder), cases.make_sequences()
    reference = torch.load(folder / "reference.pt")
    worker = MegatronWorker.from_hf(folder, layout, seed=0, optimizer=cases.NO_CLIP)
    result = {
        "export": cases.max_difference(
            cases.export(worker), load_file(folder / "model.safetensors")
        )
    }
    batches = [cases.pack(sequences[i : i + 4]) for i in range(0, len(sequences), 4)]
    mask = torch.cat([s.mask for s in sequences]) > 0
    logprobs = worker.logprobs(batches)
    difference = torch.cat(logprobs) - torch.cat(reference["logprobs"])
    result["logprobs"] = float(difference[mask].abs().max())
    mine = cases.share(worker, sequences)
    few = min(worker.dp_rank, 2)  # every rank another number of micro-batches, one of them none
    again = worker.logprobs(batches[:few])
    result["uneven"] = float(
        sum((a - b).abs().max() for a, b in zip(again, logprobs[:few], strict=True))
    )
    step = worker.train_step(mine, cases.loss_fn)
    grads = reference["grads"]
    result["loss"] = abs(step.loss - reference["loss"])
    result["grad_norm"] = abs(
        step.grad_norm - float(torch.stack([g.norm() for g in grads.values()]).norm())
    )
    result["grads"] = cases.max_difference(cases.export_gradients(worker), grads)
    return result


def export_bfloat16(folder, layout):
    """Count the tensors that differ from the file in a bit, and all tensors, over all ranks."""
    worker = MegatronWorker.from_hf(Path(folder) / "bf16", layout, seed=0)
    expected = load_file(Path(folder) / "bf16" / "model.safetensors")
    exported = cases.export(worker)
    assert set(exported) == set(expected)
    wrong = sum(
        not torch.equal(exported[name].view(torch.int16), expected[name].view(torch.int16))
        for name in expected
    )
    return sum(gather_objects(wrong)), len(expected)


def push(folder, layout, url, run_folder):
    """Push trained experts from eight ranks into the test server at ``url``, by two transports."""
    worker = MegatronWorker.from_hf(folder, layout, seed=0, optimizer=cases.ADAM)
    worker.train_step(cases.share(worker, cases.make_sequences()), cases.loss_fn)
    engine = (
        SglangServer(
            url,
            api_key=None,
            vocab_size=cases.VOCAB,
            max_context=64,
            max_in_flight=4,
            request_timeout_s=60,
            control_timeout_s=60,
        )
        if worker.is_main
        else None
    )
    found = {}
    for version, transport in enumerate(("disk", "distributed"), start=1):
        sync = WeightSync.build(
            WeightSyncConfig(transport=transport, checksums="require", timeout_s=60),
            worker,
            engine_kind="sglang",
            folder=Path(run_folder),
        )
        # Buckets of 16 KiB: this model would fit into one of the smallest allowed size.
        sync.plan = plan_sync(
            worker.spec,
            "float32",
            tensor_parallel=layout.tensor_parallel,
            engine_tensor_parallel=1,
            bucket_bytes=16 << 10,
        )
        with torch.no_grad():  # so that every push has something to bring
            for parameter in worker.model.parameters():
                parameter.mul_(1.5)
        before = run_async(sync.differing_tensors(worker, engine)) if version > 1 else []
        run_async(sync.push(worker, engine, version))
        after = run_async(sync.differing_tensors(worker, engine))
        alive = gather_objects(
            cases.bytes_alive_during(worker.export_hf(), worker.model.parameters())
        )
        found[transport] = {
            "before": len(before),
            "after": after,
            "memory": [sync.memory_peak, sync.plan.buffer_bytes + sync.plan.largest_bytes],
            "gathered": [max(alive), sync.plan.gather_bytes],
            "buckets": len(sync.plan.buckets),
        }
        if worker.is_main:
            run_async(sync.close())
    if engine is not None:
        run_async(engine.close())
    return found


def layout(tp, pp, ep=1, dtype="float32", split_rows=False, **more):
    return MegatronConfig(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=8 // (tp * pp),
        expert_parallel=ep,
        dtype=dtype,
        sequence_parallel=split_rows and tp > 1,
        **{"distributed_optimizer": False, **more},
    )


def family_ranks(folders, store):
    """Run every family under every layout. Rank 0 writes the results."""
    results = {}
    for (name, sizes), family in itertools.product(LAYOUTS.items(), FAMILIES):
        experts = family == "qwen3_moe"
        results[f"{family}_{name}"] = compare(folders[family], layout(*sizes, split_rows=experts))
        results[f"{family}_{name}"]["bfloat16"] = export_bfloat16(
            folders[family], layout(*sizes, dtype="bfloat16", split_rows=experts)
        )
    for family in ("qwen3", "qwen3_moe"):
        results[f"{family}_full"] = compare(
            folders[family], layout(4, 2, split_rows=True, recompute_granularity="full")
        )
    results["qwen3_moe_selective"] = compare(
        folders["qwen3_moe"], layout(2, 2, 2, split_rows=True, recompute_granularity="selective")
    )
    _write(results, store, "families.json")


def expert_ranks(folders, store, url):
    """Run the cases of experts: layouts, pushes to the test server at ``url``, resuming."""
    results, folder = {}, folders["qwen3_moe"]
    for name, sizes in EXPERT_LAYOUTS.items():
        results[f"qwen3_moe_{name}"] = compare(folder, layout(*sizes, split_rows=True))
        results[f"qwen3_moe_{name}"]["bfloat16"] = export_bfloat16(
            folder, layout(*sizes, dtype="bfloat16", split_rows=True)
        )
        results[f"push_{name}"] = push(
            folder, layout(*sizes, split_rows=True), url, f"{store}/push_{name}"
        )
    saved, other = (
        layout(*sizes, split_rows=True, distributed_optimizer=True)
        for sizes in ((2, 1, 2), (1, 2, 4))
    )
    expected, resumed = cases.resume(folder, f"{store}/checkpoint", saved, [saved, other])
    results["resume"] = {"expected": expected, "resumed": resumed}
    _write(results, store, "experts.json")


def _write(results, store, name):
    if torch.distributed.get_rank() == 0:
        (Path(store) / name).write_text(json.dumps(results))


def checkpoint_keys(spec):
    """Return the keys of a distributed checkpoint, each with its stacked axes and first parameter."""
    keys = {}
    for param in map_params(spec):
        name, stacked = param.megatron_names[-1], ()
        if name.startswith("decoder.layers."):
            name, stacked = re.sub(r"layers\.\d+\.", "layers.", name), (spec.num_layers,)
        if param.expert is not None:
            name = re.sub(r"weight\d+$", "weight", name).replace(
                "mlp.experts.", "mlp.experts.experts."
            )
            stacked += (spec.experts.count,)
        keys.setdefault(name, (stacked, param))
    return keys


def shards_of(entry):
    """Return the sharded tensors of an entry of a sharded state dict; gate and up are two."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    if isinstance(built, dict):
        return [shard for value in built.values() for shard in shards_of(value)]
    if isinstance(built, list):
        return [shard for value in built for shard in shards_of(value)]
    return [built] if isinstance(built, ShardedTensor) else []
