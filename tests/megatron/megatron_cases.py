"""A tiny random Qwen2, what transformers says about it, and what a MegatronWorker under some layout
says about it.
"""

import json
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spark_nemo.config import MegatronConfig, OptimizerConfig, WeightSyncConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.base import EngineFailure, EngineUnavailable
from spark_nemo.engines.fleet import Fleet, FleetLimits
from spark_nemo.engines.local import LocalEngine
from spark_nemo.megatron import checkpoint
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.process_groups import gather_objects
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.weight_sync.logprob_gate import FirstStepGate
from spark_nemo.weight_sync.synchronizer import WeightSync

VOCAB = 67  # odd: the vocabulary has to be padded under every tensor-parallel size but 1
LENGTHS = (9, 4, 17, 9, 1, 30, 12, 5, 8, 21)
ADAM = OptimizerConfig(lr=1e-3, weight_decay=0.1, eps=1e-6, clip_grad=0.5)
NO_CLIP = OptimizerConfig(lr=1e-3, clip_grad=0.0)


@dataclass(frozen=True)
class Sequence:
    """One sequence; ``labels`` are shifted already, ``weights`` are its advantages, ``mask`` may be
    a fraction.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor


def make_sequences(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)

    def one(length):
        ids = torch.randint(0, VOCAB, (length + 1,), generator=generator)
        mask = torch.randint(0, 3, (length,), generator=generator).float() / 2
        mask[-1] = 1.0
        labels = torch.where(mask > 0, ids[1:], -100)  # arbitrary where the mask is 0
        return Sequence(ids[:-1], labels, mask, torch.randn(length, generator=generator))

    return [one(length) for length in lengths]


def pack(sequences):
    lengths = torch.tensor([0] + [len(s.tokens) for s in sequences])
    return PackedBatch(
        tokens_T=torch.cat([s.tokens for s in sequences]),
        labels_T=torch.cat([s.labels for s in sequences]),
        positions_T=torch.cat([torch.arange(len(s.tokens)) for s in sequences]),
        cu_seqlens_N=lengths.cumsum(0).int(),
        loss_mask_T=torch.cat([s.mask for s in sequences]),
        extras={"weights": torch.cat([s.weights for s in sequences])},
    )


def loss_fn(logprobs_T, entropy_T, batch):
    loss = -(logprobs_T * batch.loss_mask_T * batch.extras["weights"]).sum()
    return loss, {"tokens": batch.loss_mask_T.sum(), "weights": batch.extras["weights"].sum()}


def make_hf(folder, tied, seed=0, kv_heads=4):
    """Save a model in ``folder`` and return it. Norms and biases are random: at 1 and 0 they would
    hide mistakes.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = (
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCAB,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=kv_heads,
                tie_word_embeddings=tied,
                max_position_embeddings=64,
                use_sliding_window=False,
                initializer_range=0.1,
            )
        )
        .float()
        .train()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def hf_logprobs(model, sequence, temperature=1.0):
    logits = model(sequence.tokens[None]).logits[0] / temperature
    return logits.log_softmax(-1).gather(1, sequence.labels.clamp(min=0)[:, None])[:, 0]


def hf_loss(model, sequences):
    total = sum(-(hf_logprobs(model, s) * s.mask * s.weights).sum() for s in sequences)
    return total / sum(s.mask.sum() for s in sequences)


def write_reference(folder, tied):
    """Return transformers' logprobs, loss, gradients, and weights after 5 steps of AdamW."""
    model, sequences = make_hf(folder, tied), make_sequences()
    reference = {"logprobs": [hf_logprobs(model, s).detach() for s in sequences]}
    loss = hf_loss(model, sequences)
    loss.backward()
    reference |= {
        "loss": loss.item(),
        "grads": {n: p.grad.clone() for n, p in model.named_parameters()},
    }
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed}, {"params": rest, "weight_decay": 0.0}],
        lr=ADAM.lr,
        weight_decay=ADAM.weight_decay,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
    )
    for step in range(5):
        adam.zero_grad()
        hf_loss(model, make_sequences(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_grad)
        adam.step()
    reference["trained"] = {n: p.detach() for n, p in model.named_parameters()}
    torch.save(reference, Path(folder) / "reference.pt")


def share(worker, sequences, per_batch=3):
    """This data-parallel rank's micro-batches; the last rank of four gets none at all, the others
    uneven numbers.
    """
    ranks = max(1, worker.dp_size - 1) if worker.dp_size > 2 else worker.dp_size
    own = sequences[worker.dp_rank :: ranks] if worker.dp_rank < ranks else []
    return [pack(own[i : i + per_batch]) for i in range(0, len(own), per_batch)]


def max_difference(tensors, expected):
    tensors = dict(tensors)
    assert set(tensors) == set(expected), set(tensors) ^ set(expected)
    return max(float((tensors[name] - expected[name]).abs().max()) for name in expected)


def export(worker):
    return {name: tensor.clone() for name, tensor in worker.export_hf()}


def export_gradients(worker):
    """Return the last step's gradients under Hugging Face names, through the weights' export."""
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.copy_(parameter.main_grad)
    return export(worker)


def compare(folder, layout, per_batch=3):
    """Largest absolute differences to transformers' numbers under ``layout``; the same on every
    rank.
    """
    reference, sequences = torch.load(Path(folder) / "reference.pt"), make_sequences()
    result = {}
    worker = MegatronWorker.from_hf(folder, layout, seed=0, optimizer=NO_CLIP)
    batches = [pack(sequences[i : i + per_batch]) for i in range(0, len(sequences), per_batch)]
    logprobs = torch.cat(worker.logprobs(batches))
    mask = torch.cat([s.mask for s in sequences]) > 0
    result["logprobs"] = float((logprobs - torch.cat(reference["logprobs"]))[mask].abs().max())
    result["export"] = max_difference(export(worker), _hf_tensors(folder))

    step = worker.train_step(share(worker, sequences, per_batch), loss_fn)
    result["loss"] = abs(step.loss - reference["loss"])
    result["num_tokens"] = abs(step.num_tokens - float(sum(s.mask.sum() for s in sequences)))
    result["metrics"] = abs(
        step.metrics["weights"] - float(sum(s.weights.sum() for s in sequences))
    )
    grads = reference["grads"]
    result["grad_norm"] = abs(
        step.grad_norm - float(torch.stack([g.norm() for g in grads.values()]).norm())
    )
    # The distributed optimizer keeps only this rank's part of a gradient.
    if not layout.distributed_optimizer:
        result["grads"] = max_difference(export_gradients(worker), grads)

    worker = MegatronWorker.from_hf(folder, layout, seed=0, optimizer=ADAM)
    for number in range(5):
        worker.train_step(share(worker, make_sequences(number), per_batch), loss_fn)
    result["adam"] = max_difference(export(worker), reference["trained"])
    return result


def _hf_tensors(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def resume(folder, store, saved_layout, loaded_layouts, settings=ADAM):
    """Losses and gradient norms of two steps after a save, and after loading under each other
    layout.
    """

    def two_steps(worker):
        steps = [
            worker.train_step(share(worker, make_sequences(10 + n)), loss_fn) for n in range(2)
        ]
        return [(s.loss, s.grad_norm, s.lr) for s in steps]

    worker = MegatronWorker.from_hf(folder, saved_layout, seed=0, optimizer=settings, total_steps=6)
    for number in range(2):
        worker.train_step(share(worker, make_sequences(number)), loss_fn)
    worker.save_checkpoint(store, {"epoch": 1})
    expected, resumed = two_steps(worker), []
    for layout in loaded_layouts:
        worker = MegatronWorker.from_config(
            worker.hf_config, layout, seed=7, optimizer=settings, total_steps=6
        )
        assert (
            checkpoint.has_checkpoint(store)
            and worker.load_checkpoint(store) == {"epoch": 1}
            and worker.step == 2
        )
        resumed.append(two_steps(worker))
    return expected, resumed


def push(folder, layout):
    """Trained weights from four ranks into the embedded engine of rank 0, and what each rank sees
    of a failure.
    """
    worker = MegatronWorker.from_hf(folder, layout, seed=0, optimizer=ADAM)
    settings = WeightSyncConfig(
        checksums="require", max_mean_mismatch=1e-5, max_token_mismatch=1e-4
    )
    sync = WeightSync.build(settings, worker, engine_kind="local", folder=Path("unused"))
    engine = (
        LocalEngine.from_folder(folder, max_batch_size=4, max_context=40)
        if worker.is_main
        else None
    )
    worker.train_step(share(worker, make_sequences()), loss_fn)
    found = {"differing_before": len(run_async(sync.differing_tensors(worker, engine)))}
    run_async(sync.push(worker, engine, 1))
    found["differing_after"] = run_async(sync.differing_tensors(worker, engine))
    found["memory"] = [sync.memory_peak, sync.plan.buffer_bytes + sync.plan.largest_bytes]
    alive = bytes_alive_during(worker.export_hf(), worker.model.parameters())
    found["gathered"] = [gather_objects(alive), sync.plan.gather_bytes]
    fleet = _returning_fleet(engine) if engine is not None else None
    found["returned"] = gather_objects(_error_of(lambda: run_async(sync.push(worker, fleet, 2))))
    found["version"] = run_async(engine.health()).weight_version if engine is not None else None
    found["gone_again"] = gather_objects(_error_of(lambda: run_async(sync.push(worker, fleet, 3))))
    if engine is not None:
        engine.update_weights = _refuse
    found["refused"] = gather_objects(_error_of(lambda: run_async(sync.push(worker, engine, 2))))
    gate, row = FirstStepGate(settings), torch.zeros(4)
    if torch.distributed.get_rank() == 3:  # one rank alone has seen a token that differs
        gate.observe(row, row - 0.5, row.long(), row == 0)
    found["gate"] = gather_objects(_error_of(gate.decide))
    return found


class _Allocations(TorchDispatchMode):
    """Bytes of the storages made under this mode that are alive, and the most there ever were."""

    def __init__(self, existing):
        super().__init__()
        self.alive, self.peak = 0, 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self.sizes or storage.nbytes() == 0:
            return
        self.sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        weakref.finalize(storage, self._freed, key)
        if self.alive > self.peak:
            time.sleep(0.05)  # gloo's thread releases the last tensor a moment after the wait
            self.peak = max(self.peak, self.alive)

    def _freed(self, key):
        self.alive -= self.sizes.pop(key, 0)


def bytes_alive_during(tensors, existing):
    """The most bytes that iterating holds at once beyond the storages of ``existing``."""
    with _Allocations(existing) as allocations:
        for _, tensor in tensors:
            del tensor
    return allocations.peak


async def _refuse(tensors, version):
    next(iter(tensors))
    raise EngineFailure("out of memory")


def _returning_fleet(engine):
    """A fleet of ``engine`` alone, which is lost in the first update half-way, takes the second one
    and no other.
    """
    take, calls = engine.update_weights, []

    async def update(tensors, version):
        calls.append(version)
        if len(calls) != 2:
            next(iter(tensors))
            raise EngineUnavailable("connection refused")
        await take(tensors, version)

    engine.update_weights = update
    fleet = Fleet({"m0": engine}, FleetLimits(backoff_s=0.3), name="policy pool")
    # For checksums; in the package no fleet has embedded engines.
    fleet.served_form = engine.served_form
    return fleet


def _error_of(call):
    try:
        call()
    except EngineFailure as error:
        return str(error)
    return None


def four_ranks(tied_folder, untied_folder, store):
    """Everything that needs several ranks, in one launch. Rank 0 writes what the tests assert."""

    def layout(tp, pp, dp, **more):
        return MegatronConfig(
            tensor_parallel=tp,
            pipeline_parallel=pp,
            data_parallel=dp,
            dtype="float32",
            **{"distributed_optimizer": False, **more},
        )

    results = {
        "tp2_pp2_tied": compare(tied_folder, layout(2, 2, 1)),
        "tp2_pp2_untied": compare(untied_folder, layout(2, 2, 1), per_batch=4),
        "tp2_tied": compare(tied_folder, layout(2, 1, 2)),
        "tp2_untied": compare(untied_folder, layout(2, 1, 2)),
        "pp2_tied": compare(tied_folder, layout(1, 2, 2)),
        "pp2_untied": compare(untied_folder, layout(1, 2, 2)),
        "tp2_dp2_sp": compare(untied_folder, layout(2, 1, 2, sequence_parallel=True)),
        "pp2_dp2_distributed_optimizer": compare(
            tied_folder, layout(1, 2, 2, distributed_optimizer=True)
        ),
        "tp2_pp2_sp_full_recompute": compare(
            tied_folder,
            layout(2, 2, 1, sequence_parallel=True, recompute_granularity="full"),
            per_batch=2,
        ),
        "pp4_selective_recompute": compare(
            untied_folder, layout(1, 4, 1, recompute_granularity="selective"), per_batch=1
        ),
        "tp4": compare(tied_folder, layout(4, 1, 1), per_batch=10),
        "dp4_one_rank_idle": compare(tied_folder, layout(1, 1, 4)),
    }
    for distributed in (False, True):
        same, others = (
            layout(2, 1, 2, distributed_optimizer=distributed),
            [(1, 1, 4), (1, 2, 2), (2, 2, 1)],
        )
        expected, resumed = resume(
            untied_folder,
            f"{store}/{distributed}",
            same,
            [same] + [layout(*sizes, distributed_optimizer=distributed) for sizes in others],
        )
        results[f"resume_{distributed}"] = {"expected": expected, "resumed": resumed}

    results["push_tied"] = push(tied_folder, layout(2, 2, 1))
    results["push_untied"] = push(untied_folder, layout(2, 1, 2))
    worker = MegatronWorker.from_config(
        json.loads((Path(tied_folder) / "config.json").read_text()), layout(2, 2, 1), seed=3
    )
    worker.save_hf(f"{store}/random_tp2_pp2", source_dir=None)
    if worker.is_main:
        (Path(store) / "results.json").write_text(json.dumps(results))
