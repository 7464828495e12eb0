"""Memory of one GPU of an engine: its slice of the model, and a KV cache in the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spark_nemo.config import ConfigError
from spark_nemo.models.spec import ModelSpec
from spark_nemo.weight_sync.engine_view import engine_tensors

from .cluster import GB, Cluster, Rates
from .workload import Generation, Model

_ITEM = 2  # engines serve bfloat16


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of an engine of ``tensor_parallel`` GPUs."""

    tensor_parallel: int
    weights: int
    kv_token: int
    """Bytes of KV cache per token."""
    kv_tokens: int
    """KV cache of all running texts in tokens; negative if the weights alone do not fit."""
    running: int
    """Texts of mean length decoded together: as many as fit, at most engine.max_batch_size."""

    def fits(self, context: int) -> bool:
        """Return whether one text of full length fits."""
        return self.kv_tokens >= context


def kv_bytes_per_token(spec: ModelSpec, tensor_parallel: int) -> int:
    """Return the bytes of keys and values of all layers for one token on one GPU.

    With more GPUs than key-value heads, each GPU has one head.
    """
    heads = max(1, spec.num_kv_heads // tensor_parallel)
    return 2 * spec.num_layers * heads * spec.head_dim * _ITEM


def engine_weight_bytes(model: Model, tensor_parallel: int) -> int:
    """Return the bytes of the first rank's parameters, from weight sync's view of SGLang."""
    return _ITEM * sum(
        math.prod(tensor.shape) for tensor in engine_tensors(model.spec, tensor_parallel, 0)
    )


def engine_memory(
    generation: Generation,
    tensor_parallel: int,
    max_batch_size: int,
    cluster: Cluster,
    rates: Rates,
) -> EngineMemory:
    """Return a GPU's memory. Raises ``ConfigError`` if SGLang cannot split the model this way."""
    weights = engine_weight_bytes(generation.model, tensor_parallel)
    per_token = kv_bytes_per_token(generation.model.spec, tensor_parallel)
    room = int((cluster.gpu_memory_gb * GB * rates.kv_share - weights) // per_token)
    mean = generation.context * rates.mean_length
    return EngineMemory(
        tensor_parallel, weights, per_token, room, max(0, min(max_batch_size, int(room // mean)))
    )


def possible_engines(
    generation: Generation, max_batch_size: int, cluster: Cluster, rates: Rates
) -> list[EngineMemory]:
    """Return engines of 1, 2, 4, ... GPUs on one node that hold the model and one full text.

    The smallest comes first. Raises ``ConfigError`` with what the largest one lacks.
    """
    found = []
    last = None
    split_error = None
    size = 1
    while size <= cluster.gpus_per_node:
        try:
            last = engine_memory(generation, size, max_batch_size, cluster, rates)
        except ConfigError as error:
            split_error = error
        else:
            if last.fits(generation.context):
                found.append(last)
        size *= 2
    if found:
        return found
    if last is None:
        assert split_error is not None
        raise split_error
    missing = (generation.context - last.kv_tokens) * last.kv_token / GB
    raise ConfigError(
        f"{generation.model.name} does not fit an engine of {last.tensor_parallel} GPUs with "
        f"{cluster.gpu_memory_gb:g} GB: {last.weights / GB:.1f} GB of weights each, and one text "
        f"of {generation.context:,} tokens lacks {missing:.1f} GB; use more or larger GPUs per node"
    )
