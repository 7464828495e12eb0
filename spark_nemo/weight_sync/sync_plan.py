"""Plan a weight sync: the tensors to send, their order and buckets, and the memory this takes.

``plan_sync`` is a pure function without torch or process groups. A push follows the plan, and the
checksums are computed through its view of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.config import ConfigError
from spark_nemo.models.param_mapping import MappedParam, Split, hf_tensor_shapes, map_params
from spark_nemo.models.spec import ModelSpec

from .engine_view import EngineTensor, check_syncable, engine_tensors

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """Tensors of a sync in their order, and the memory that the sync takes."""

    tensors: tuple[TensorPlan, ...]
    """Hugging Face tensors in the order of the export and of ``buckets``."""
    engine_ranks: tuple[tuple[EngineTensor, ...], ...]
    """Parameters of each tensor-parallel rank of an engine, as slices of Hugging Face tensors."""
    buckets: tuple[tuple[str, ...], ...]
    """Names of tensors sent together: at most ``bucket_bytes``, or one tensor that is larger."""
    bucket_bytes: int
    buffer_bytes: int
    """Size of the main rank's buffer: the largest bucket that fits ``bucket_bytes``."""
    gather_bytes: int
    """Most that a rank holds of one Megatron parameter: gathered shards and tensors made of them."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face tensors by name."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def peak_bytes(self) -> int:
        """Most that any rank holds in addition to its own shards of the model."""
        return self.buffer_bytes + self.gather_bytes

    @property
    def largest_bytes(self) -> int:
        """Size of the largest Hugging Face tensor."""
        return max(tensor.num_bytes for tensor in self.tensors)

    @property
    def total_bytes(self) -> int:
        """Size of the whole model."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_sync(
    spec: ModelSpec,
    dtype: str,
    *,
    tensor_parallel: int,
    engine_tensor_parallel: int,
    bucket_bytes: int,
) -> SyncPlan:
    """Plan the sync of a trainer of ``tensor_parallel`` ranks with engines of their own layout.

    Raises ``ConfigError`` when SGLang cannot serve the model in that layout.
    """
    check_syncable(spec)
    if dtype not in _DTYPE_BYTES:
        raise ConfigError(
            f"dtype={dtype!r} is not supported: choose one of {', '.join(_DTYPE_BYTES)}"
        )
    if bucket_bytes < 1:
        raise ConfigError(f"weight_sync.bucket_bytes={bucket_bytes}: must be positive")
    itemsize = _DTYPE_BYTES[dtype]
    tensors = tuple(
        TensorPlan(name, shape, math.prod(shape) * itemsize)
        for name, shape in hf_tensor_shapes(spec).items()
    )
    buckets = _fill_buckets(tensors, bucket_bytes)
    bucket_sizes = [sum(tensor.num_bytes for tensor in bucket) for bucket in buckets]
    return SyncPlan(
        tensors=tensors,
        engine_ranks=tuple(
            engine_tensors(spec, engine_tensor_parallel, rank)
            for rank in range(engine_tensor_parallel)
        ),
        buckets=tuple(tuple(tensor.name for tensor in bucket) for bucket in buckets),
        bucket_bytes=bucket_bytes,
        # A larger tensor is sent from its own memory, not through the buffer.
        buffer_bytes=max((size for size in bucket_sizes if size <= bucket_bytes), default=0),
        gather_bytes=itemsize
        * max(_gathered_elements(param, spec, tensor_parallel) for param in map_params(spec)),
    )


def _fill_buckets(tensors: Sequence[TensorPlan], bucket_bytes: int) -> list[list[TensorPlan]]:
    """Group consecutive tensors up to ``bucket_bytes``; a larger tensor has a bucket of its own."""
    buckets: list[list[TensorPlan]] = []
    used = 0
    for tensor in tensors:
        if not buckets or used + tensor.num_bytes > bucket_bytes:
            buckets.append([])
            used = 0
        buckets[-1].append(tensor)
        used += tensor.num_bytes
    return buckets


def _gathered_elements(param: MappedParam, spec: ModelSpec, tp: int) -> int:
    """Return the elements that ``megatron.hf_weights.export_tensors`` holds of one parameter."""
    if param.split is Split.VOCAB_ROWS:
        # Gathered into the Hugging Face tensor itself.
        return spec.padded_vocab_size(tp) * spec.hidden_size
    if tp == 1 or param.expert is not None or param.split is Split.REPLICATED:
        return param.num_elements  # whole on its rank
    return 2 * param.num_elements  # gathered, then copied into its tensors
