"""Measured memory of small models, to compare with ``megatron.sizing``."""

import json
import weakref
from pathlib import Path

import megatron_cases as cases
import torch

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.megatron.process_groups import gather_objects
from spark_nemo.megatron.worker import MegatronWorker

MODELS = {
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
}
_SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": cases.VOCAB,
}
LENGTHS = (48, 40)  # one micro-batch: 88 tokens
MICRO_BATCHES = 4


def hf_config(model):
    return {**_SIZES, **MODELS[model]}


def layouts(world_size, model="qwen2_tied"):
    """Return the layouts to measure: all combinations for the first model, a few for the others.

    Experts under tensor parallelism need sequence parallelism.
    """
    sizes = [(1, 1), (2, 1), (1, 2), (2, 2)] if world_size > 1 else [(1, 1)]
    numerics = [
        (dtype, *more, "float32")
        for dtype in ("float32", "bfloat16")
        for more in ((True, "none", True), (False, "selective", False), (True, "full", True))
    ]
    reduced = [("bfloat16", distributed, "none", True, "bfloat16") for distributed in (True, False)]
    if model != "qwen2_tied":
        numerics = [("bfloat16", True, "none", True, "float32")] if world_size > 1 else numerics[3:]
        reduced = reduced[:1] if model == "qwen3_moe" else []
    return [
        MegatronConfig(
            tensor_parallel=tp,
            pipeline_parallel=pp,
            data_parallel=world_size // (tp * pp),
            dtype=dtype,
            distributed_optimizer=distributed,
            recompute_granularity=recompute,
            sequence_parallel=tp > 1 and sp,
            grad_reduce_dtype=gradients,
        )
        for tp, pp in sizes
        for dtype, distributed, recompute, sp, gradients in numerics + reduced
    ] + ([MegatronConfig(tensor_parallel=4)] if world_size == 4 and model != "qwen3_moe" else [])


def measure(model, layout):
    """Return bytes of this rank's weights, gradients, gradient copies, optimizer state and graphs
    in a step, and the gradient norm.
    """
    worker = MegatronWorker.from_config(
        hf_config(model), layout, seed=0, optimizer=OptimizerConfig()
    )
    saved = SavedForBackward(worker.model.parameters())
    batches = [cases.pack(cases.make_sequences(seed, LENGTHS)) for seed in range(MICRO_BATCHES)]
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        step = worker.train_step(batches, cases.loss_fn, with_entropy=True)
    buffers = worker._trained.buffers + worker._trained.expert_parallel_buffers
    flat = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    weights = storages(flat or worker.model.parameters())
    gradients = storages([buffer.grad_data for buffer in buffers])
    owned = [
        (parameter, part.optimizer.state[parameter])
        for part in worker._optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert all(parameter.grad is None for parameter, _ in owned), "copies outlive the step"
    states = [
        tensor
        for parameter, state in owned
        for tensor in (parameter, *state.values())
        if tensor.dim() > 0
    ]
    optimizer = {key: size for key, size in storages(states).items() if key not in weights}
    worker._optimizer.prepare_grads()
    copies = storages(parameter.grad for parameter, _ in owned)
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "activations": saved.peak,
        "grad_norm": step.grad_norm,
        "gradient_copies": sum(size for key, size in copies.items() if key not in gradients),
        "parameters": sum(parameter.numel() for parameter in worker.model.parameters()),
    }


def step_peak(config, layout, lengths):
    """Return the most bytes alive in a step in addition to weights, gradients and optimizer state."""
    worker = MegatronWorker.from_config(config, layout, seed=0, optimizer=OptimizerConfig())
    batch, peak = cases.pack(cases.make_sequences(0, lengths)), []
    worker.train_step([batch], cases.loss_fn, with_entropy=True)
    existing = [*worker.model.parameters(), *batch.extras.values()]
    for buffer in worker._trained.buffers:
        existing += [flat for flat in (buffer.grad_data, buffer.param_data) if flat is not None]
    for part in worker._optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            existing += state.values()
        existing += [
            parameter for group in part.optimizer.param_groups for parameter in group["params"]
        ]
    with cases._Allocations(existing) as allocations:
        worker.train_step(
            [batch], cases.loss_fn, with_entropy=True, check=lambda: peak.append(allocations.peak)
        )
    return peak[0]


def storages(tensors):
    """Return the size of every storage behind ``tensors``, each once."""
    return {
        each.data_ptr(): each.nbytes() for each in (tensor.untyped_storage() for tensor in tensors)
    }


class SavedForBackward:
    """Counts the storages that autograd keeps for a backward pass, each once, without parameters."""

    def __init__(self, parameters):
        self.parameters, self.users = set(storages(parameters)), {}
        self.alive = self.peak = 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameters:
            return tensor
        kept = _Kept(tensor)
        if not self.users.get(storage.data_ptr()):
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
        self.users[storage.data_ptr()] = self.users.get(storage.data_ptr(), 0) + 1
        weakref.finalize(kept, self._free, storage.data_ptr(), storage.nbytes())
        return kept

    def unpack(self, kept):
        return kept.tensor if isinstance(kept, _Kept) else kept

    def _free(self, key, size):
        self.users[key] -= 1
        if not self.users[key]:
            self.alive -= size


class _Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def four_ranks(store):
    """Measure every model under every layout; rank 0 writes what all ranks found, in rank order."""
    results = [
        {"model": model, "layout": vars(layout), "ranks": gather_objects(measure(model, layout))}
        for model in MODELS
        for layout in layouts(4, model)
    ]
    if torch.distributed.get_rank() == 0:
        Path(store, "measured.json").write_text(json.dumps(results))
