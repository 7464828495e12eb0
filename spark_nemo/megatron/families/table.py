"""What a family's table is made of: rules from Hugging Face tensors to Megatron parameters, and
generic transforms.

No torch at import time: configurations are checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .parts import Experts

if TYPE_CHECKING:
    from torch import Tensor

    from ..model_shape import ModelShape

    Shards = list[Tensor]
    """One tensor per tensor-parallel rank."""


@dataclass(frozen=True)
class Transform:
    """How Hugging Face tensors become the shards of one Megatron parameter, and back.

    With one shard it is the parameter as a distributed checkpoint holds it, whatever the parallel
    layout.
    """

    to_shards: Callable[[list[Tensor], ModelShape, int], Shards]
    from_gathered: Callable[[Tensor, ModelShape, int], list[Tensor]]
    """From the shards below each other in one tensor: what is cut by rows needs no second copy."""
    shard_dim: int | None
    """Dimension that tensor-parallel ranks share out; None where each has all of it."""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (``{i}`` is the layer within its stage) and the Hugging Face tensors
    it is made of.
    """

    megatron: tuple[str, ...]
    """Its possible names, Transformer Engine's last: that one fuses a norm into the linear layer
    that follows.
    """
    hf: dict[str, tuple[int, ...]]
    """Names (``{i}`` is the layer of the whole model) and shapes, in the order of ``transform``."""
    transform: Transform
    per_expert: bool = False
    """One rule for every expert: ``{e}`` is the expert, of its rank in ``megatron`` and of the
    layer in ``hf``.
    """


@dataclass(frozen=True)
class Table:
    """Rules for the first pipeline stage, for every layer and for the last stage."""

    first: list[Rule]
    layer: list[Rule]
    last: list[Rule]


ONLY = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
"""Settings of config.json with the only value that is computed here; they may be absent."""


@dataclass(frozen=True)
class Family:
    """A model family: its tensors, and what Megatron and ``ModelShape`` have to know about it."""

    model_type: str
    """As in config.json."""
    table: Callable[[ModelShape], Table]
    qkv_bias: bool = False
    """Biases on q, k and v."""
    qk_norm: bool = False
    """An RMS norm over every query and key head."""
    rope_types: tuple[str, ...] = ("default",)
    """Rotary embeddings it may ask for."""
    only: Mapping[str, Any] = field(default_factory=lambda: ONLY)
    """Settings with the one value that is supported; any other is refused, not ignored."""
    required: tuple[str, ...] = ()
    """Settings that may not be absent, because transformers' default is no general one."""
    experts: Callable[[Mapping[str, Any], Callable[[str], Any]], Experts] | None = None
    """Reads the experts of a config.json (``get`` raises for what is missing); None for dense
    families.
    """


def _chunks(tensor: Tensor, tp: int, dim: int) -> Shards:
    return list(tensor.chunk(tp, dim))


def _split_columns_back(gathered: Tensor, shape: ModelShape, tp: int) -> list[Tensor]:
    import torch

    return [torch.cat(gathered.chunk(tp), 1)]


def _pad_vocab(hf: list[Tensor], shape: ModelShape, tp: int) -> Shards:
    import torch

    missing = shape.padded_vocab_size(tp) - shape.vocab_size
    if not missing:
        return _chunks(hf[0], tp, 0)  # an embedding is the largest tensor: no second copy
    return _chunks(torch.cat([hf[0], hf[0].new_zeros(missing, hf[0].shape[1])]), tp, 0)


def _fuse_qkv(hf: list[Tensor], shape: ModelShape, tp: int) -> Shards:
    """Rows in Megatron's order: for each key-value head its query heads, then the key, then the
    value.

    With more ranks than key-value heads a rank gets a piece of one head's group, as in
    megatron-core, which gathers the product over the ranks and picks each rank's heads from it
    (transformer/attention.py).
    """
    import torch

    grouped = [x.reshape(shape.num_kv_heads, -1, *x.shape[1:]) for x in hf]
    return _chunks(torch.cat(grouped, 1).reshape(-1, *hf[0].shape[1:]), tp, 0)


def _split_qkv(fused: Tensor, shape: ModelShape, tp: int) -> list[Tensor]:
    grouped = fused.reshape(shape.num_kv_heads, -1, *fused.shape[1:])
    queries = shape.num_heads // shape.num_kv_heads * shape.head_dim
    parts = grouped.split([queries, shape.head_dim, shape.head_dim], 1)
    return [x.reshape(-1, *fused.shape[1:]) for x in parts]


def _fuse_gate_up(hf: list[Tensor], shape: ModelShape, tp: int) -> Shards:
    import torch

    return [torch.cat(pair) for pair in zip(_chunks(hf[0], tp, 0), _chunks(hf[1], tp, 0))]


def _split_gate_up(gathered: Tensor, shape: ModelShape, tp: int) -> list[Tensor]:
    import torch

    return [torch.cat(x) for x in zip(*(shard.chunk(2) for shard in gathered.chunk(tp)))]


REPLICATED = Transform(
    lambda hf, shape, tp: [hf[0]] * tp, lambda gathered, shape, tp: [gathered], None
)
SPLIT_COLUMNS = Transform(lambda hf, shape, tp: _chunks(hf[0], tp, 1), _split_columns_back, 1)
VOCAB_ROWS = Transform(_pad_vocab, lambda gathered, shape, tp: [gathered[: shape.vocab_size]], 0)
QKV = Transform(_fuse_qkv, _split_qkv, 0)
GATE_UP = Transform(_fuse_gate_up, _split_gate_up, 0)
