"""Weights, gradients and optimizer state of one rank, with the padding of Megatron's flat buffers.

Sources: megatron-core 0.16.1, distributed/param_and_grad_buffer.py (``_ParamAndGradBuffer``: where
padding goes) and optimizer/distrib_optimizer.py (each data-parallel rank owns an equal range of
every bucket); ``megatron/optimizer.py`` (AdamW with two float32 moments).

Without padding this is the usual count of a distributed optimizer in bfloat16:
2 + 4 + 12 / data_parallel bytes per parameter. With gradients in bfloat16 it is
2 + 2 + 12 / data_parallel, and 4 / data_parallel more while the optimizer steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spark_nemo.config import MegatronConfig

from .parameters import Shapes, StageParameters

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_ADAM_MOMENTS_BYTES = 8  # two float32
_MAIN_WEIGHT_BYTES = 4  # the float32 copy of a bfloat16 weight
_TIED_PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class StateBytes:
    """Memory that stays allocated between steps, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    gradient_copies: int = 0
    """Float32 copies of bfloat16 gradients, which exist only while the optimizer steps."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    parameters: StageParameters, layout: MegatronConfig, shares_embeddings: bool = False
) -> StateBytes:
    """Return the states of one rank that trains ``parameters``.

    ``shares_embeddings``: tied embeddings are on several pipeline stages, so their copy has a bucket
    of its own. A data-parallel rank whose range ends in padding owns up to 127 elements per bucket
    fewer than counted.
    """
    item_bytes = ITEM_BYTES[layout.dtype]
    gradient_bytes = ITEM_BYTES[layout.grad_reduce_dtype]
    copy_bytes = 0 if gradient_bytes == 4 else 4
    optimizer_bytes = _ADAM_MOMENTS_BYTES
    if layout.dtype != "float32":
        optimizer_bytes += _MAIN_WEIGHT_BYTES
    if layout.distributed_optimizer:
        elements, owned = _bucketed_elements(parameters, layout, shares_embeddings)
    else:
        elements = owned = parameters.num_elements
    return StateBytes(
        weights=elements * item_bytes,
        gradients=elements * gradient_bytes,
        optimizer=owned * optimizer_bytes,
        gradient_copies=owned * copy_bytes,
    )


def weight_bytes(parameters: StageParameters, dtype: str) -> int:
    """Return the bytes of the weights alone, as in a worker for forward passes or a snapshot."""
    return parameters.num_elements * ITEM_BYTES[dtype]


def _bucketed_elements(
    parameters: StageParameters, layout: MegatronConfig, shares_embeddings: bool
) -> tuple[int, int]:
    """Return the elements of all padded buckets, and those whose optimizer state a rank owns."""
    replicas = layout.data_parallel
    buckets = [
        (shapes, replicas) for shapes in _split_tied(parameters.dense, shares_embeddings) if shapes
    ]
    if parameters.experts:
        expert_replicas = layout.tensor_parallel * replicas // layout.expert_parallel
        buckets.append((parameters.experts, expert_replicas))
    total = 0
    owned = 0
    for shapes, ranks in buckets:
        elements = _padded_elements(shapes, ranks)
        total += elements
        owned += elements // ranks
    return total, owned


def _split_tied(dense: Shapes, shares_embeddings: bool) -> tuple[Shapes, Shapes]:
    tied = {
        name: shape
        for name, shape in dense.items()
        if shares_embeddings and name in _TIED_PARAMETERS
    }
    return {name: shape for name, shape in dense.items() if name not in tied}, tied


def _padded_elements(parameters: Shapes, ranks: int) -> int:
    """Return the elements of one bucket.

    Each parameter starts at a multiple of 64; a bucket is a multiple of 128 and of the ranks that
    divide it. Buckets are not cut smaller, because the reduction is not overlapped with the backward
    pass.
    """
    elements = sum(-(-math.prod(shape) // 64) * 64 for shape in parameters.values())
    multiple = math.lcm(ranks, 128)
    return -(-elements // multiple) * multiple
