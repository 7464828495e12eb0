"""Fuse Hugging Face tensors into the shards of a Megatron parameter, and take them apart again.

``models/param_mapping.py`` says which tensors and which ``Split``; this file does it with torch.
With one rank, the only shard is the parameter as a distributed checkpoint holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spark_nemo.models.param_mapping import Split
from spark_nemo.models.spec import ModelSpec


def to_shards(split: Split, tensors: list[Tensor], spec: ModelSpec, tp: int) -> list[Tensor]:
    """Return the shard of every tensor-parallel rank."""
    first = tensors[0]
    match split:
        case Split.REPLICATED:
            return [first] * tp
        case Split.COLUMNS:
            return list(first.chunk(tp, 1))
        case Split.VOCAB_ROWS:
            missing = spec.padded_vocab_size(tp) - spec.vocab_size
            if missing:  # else no copy: an embedding is the model's largest tensor
                first = torch.cat([first, first.new_zeros(missing, first.shape[1])])
            return list(first.chunk(tp))
        case Split.QKV:
            by_head = [x.reshape(spec.num_kv_heads, -1, *x.shape[1:]) for x in tensors]
            return list(torch.cat(by_head, 1).reshape(-1, *first.shape[1:]).chunk(tp))
        case Split.GATE_UP:
            gate, up = tensors
            return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp))]


def from_gathered(split: Split, gathered: Tensor, spec: ModelSpec, tp: int) -> list[Tensor]:
    """Return the Hugging Face tensors of a parameter whose shards lie below each other.

    A parameter cut by rows is returned as views, without a second copy.
    """
    match split:
        case Split.REPLICATED:
            return [gathered]
        case Split.COLUMNS:
            return [torch.cat(gathered.chunk(tp), 1)]
        case Split.VOCAB_ROWS:
            return [gathered[: spec.vocab_size]]
        case Split.QKV:
            by_head = gathered.reshape(spec.num_kv_heads, -1, *gathered.shape[1:])
            query_rows = spec.num_heads // spec.num_kv_heads * spec.head_dim
            qkv = by_head.split([query_rows, spec.head_dim, spec.head_dim], 1)
            return [x.reshape(-1, *gathered.shape[1:]) for x in qkv]
        case Split.GATE_UP:
            halves = [shard.chunk(2) for shard in gathered.chunk(tp)]
            return [torch.cat(shards) for shards in zip(*halves)]
