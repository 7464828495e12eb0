"""Bytes of weights, gradients and optimizer state of one rank, with the padding of Megatron's flat
buffers.

Sources: megatron-core 0.16.1, distributed/param_and_grad_buffer.py (``_ParamAndGradBuffer``: where
padding goes) and optimizer/distrib_optimizer.py (each data-parallel rank owns an equal range of
every bucket); ``megatron/optimizer.py`` (AdamW with two float32 moments). Without padding this is
the usual count of a distributed optimizer in bfloat16: 2 + 4 + 12 / data_parallel bytes per
parameter, and with gradients in bfloat16 2 + 2 + 12 / data_parallel, and 4 / data_parallel while
the optimizer steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spark_nemo.config import MegatronConfig

from .parameters import Shapes, StageParameters

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENTS = 8  # AdamW: two float32 each
_MAIN = 4  # the float32 copy of a bfloat16 weight
_SHARED = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class StateBytes:
    """What stays allocated between steps, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    gradient_copies: int = 0
    """Not between steps: the float32 copies of bfloat16 gradients while the optimizer steps."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    parameters: StageParameters, layout: MegatronConfig, shares_embeddings: bool = False
) -> StateBytes:
    """The states of one rank that trains ``parameters``.

    ``shares_embeddings``: embeddings are tied over several pipeline stages, so their copy has a
    bucket of its own. A data-parallel rank whose range ends in padding owns up to 127 elements less
    of each bucket than is counted.
    """
    item, gradient = ITEM_BYTES[layout.dtype], ITEM_BYTES[layout.grad_reduce_dtype]
    copied = 4 if gradient != 4 else 0
    per_element = _MOMENTS + (_MAIN if layout.dtype != "float32" else 0)
    if not layout.distributed_optimizer:
        elements = parameters.num_elements
        return StateBytes(
            elements * item, elements * gradient, elements * per_element, elements * copied
        )
    replicas = layout.data_parallel
    buckets = [
        (names, replicas) for names in _split_shared(parameters.dense, shares_embeddings) if names
    ]
    if parameters.experts:
        buckets.append(
            (parameters.experts, layout.tensor_parallel * replicas // layout.expert_parallel)
        )
    padded = [(_bucket_elements(names, ranks), ranks) for names, ranks in buckets]
    total, owned = (
        sum(elements for elements, _ in padded),
        sum(elements // ranks for elements, ranks in padded),
    )
    return StateBytes(total * item, total * gradient, owned * per_element, owned * copied)


def weight_bytes(parameters: StageParameters, dtype: str) -> int:
    """Without gradients and optimizer: a worker for forward passes, or a snapshot."""
    return parameters.num_elements * ITEM_BYTES[dtype]


def _split_shared(dense: Shapes, shares_embeddings: bool) -> tuple[Shapes, Shapes]:
    shared = {name: size for name, size in dense.items() if shares_embeddings and name in _SHARED}
    return {name: size for name, size in dense.items() if name not in shared}, shared


def _bucket_elements(parameters: Shapes, ranks: int) -> int:
    """Each parameter starts at a multiple of 64; a bucket is a multiple of 128 and of the ranks
    that share it out. Buckets are not cut smaller, because the reduction is not overlapped with the
    backward pass.
    """
    elements = sum(-(-math.prod(size) // 64) * 64 for size in parameters.values())
    multiple = math.lcm(ranks, 128)
    return -(-elements // multiple) * multiple
