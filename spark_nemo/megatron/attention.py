"""Attention inside a pack of sequences without a [T, T] mask, on any device.

Shapes: T rows of the pack, H query heads, G key-value heads, D head size; a block has n sequences
of L rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedRows(PackedSeqParams):
    """Division of a pack of T rows into blocks ``[n, L]`` of sequences of similar length.

    ``qkv_format`` is not "thd", so Megatron treats the pack as one sequence. The core attention
    applies rotary embeddings from a table indexed by position; Megatron's thd path would loop over
    the sequences in every layer.
    """

    blocks: Sequence[tuple[int, int]] = ()
    """(n, L) of each block, in the order of ``padded_rows``."""
    padded_rows: Tensor | None = None
    """int64 [sum n * L]: the pack's row at each place of the blocks.

    Padding repeats a sequence's last row. None when the pack is exactly one block, a mere view.
    """
    rows: Tensor | None = None
    """int64 [T]: where each row of the pack is in the blocks."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines [T, 1, D / 2] of every row's position; None: no rotary embedding."""

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_N: Tensor,
        padding_share: float = 0.15,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> PackedRows:
        """Group sequences so that padding is at most about ``padding_share`` of a block.

        Padding comes after a sequence's tokens, so under a causal mask no real token sees it.
        """
        starts = cu_seqlens_N[:-1].tolist()
        ends = cu_seqlens_N[1:].tolist()
        lengths = [end - start for start, end in zip(starts, ends)]
        common = {
            "qkv_format": "packed_rows",
            "cu_seqlens_q": cu_seqlens_N,
            "cu_seqlens_kv": cu_seqlens_N,
            "max_seqlen_q": max(lengths),
            "max_seqlen_kv": max(lengths),
            "rotary": rotary,
        }
        if len(set(lengths)) == 1:
            return cls(**common, blocks=((len(lengths), lengths[0]),))

        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        groups: list[list[int]] = []
        for index in order:
            if groups and lengths[index] >= lengths[groups[-1][0]] * (1 - 2 * padding_share):
                groups[-1].append(index)
            else:
                groups.append([index])
        blocks = []
        padded = []
        place_T = torch.empty(ends[-1], dtype=torch.int64)
        offset = 0
        for group in groups:
            n = len(group)
            L = lengths[group[0]]
            first_n1 = torch.tensor([starts[i] for i in group])[:, None]
            last_n1 = torch.tensor([ends[i] - 1 for i in group])[:, None]
            rows_nL = first_n1 + torch.arange(L)
            real_nL = rows_nL <= last_n1
            place_T[rows_nL[real_nL]] = offset + torch.arange(n * L).view(n, L)[real_nL]
            padded.append(torch.minimum(rows_nL, last_n1).reshape(-1))
            blocks.append((n, L))
            offset += n * L
        device = cu_seqlens_N.device
        return cls(
            **common,
            blocks=tuple(blocks),
            padded_rows=torch.cat(padded).to(device),
            rows=place_T.to(device),
        )


class _ToBlocks(torch.autograd.Function):
    """Gather rows into padded blocks.

    The gradient is a gather too (deterministic, no index_add): padding carries none, because its
    outputs are dropped and its keys and values come after every real query.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows.rows
        return x.index_select(0, rows.padded_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.rows), None


class _FromBlocks(torch.autograd.Function):
    """Pick the real rows out of padded blocks; padding gets zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows.rows
        ctx.length = x.shape[0]
        return x.index_select(0, rows.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.length, *grad.shape[1:]).index_copy_(0, ctx.rows, grad), None


class _Rotate(torch.autograd.Function):
    """Rotary embedding of [T, heads, D] from [T, 1, D / 2] cosines and sines, by halves.

    Written into one buffer: Megatron's version makes five passes over memory forward and more
    backward, which dominates on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    out = torch.empty_like(x)
    a, b = x.chunk(2, -1)
    out_a, out_b = out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


def packed_causal_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rows: PackedRows, scale: float | None = None
) -> Tensor:
    """Return causal attention [T, H, D] of each token over its sequence; G < H groups queries."""
    qkv = (q_THD, k_TGD, v_TGD)
    if rows.padded_rows is not None:
        qkv = tuple(_ToBlocks.apply(x, rows) for x in qkv)
    sizes = [n * L for n, L in rows.blocks]
    outputs = []
    for (n, L), *block in zip(rows.blocks, *(x.split(sizes) for x in qkv)):
        q, k, v = (x.view(n, L, *x.shape[1:]).transpose(1, 2) for x in block)
        out_nHLD = F.scaled_dot_product_attention(
            q, k, v, is_causal=L > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out_nHLD.transpose(1, 2).reshape(n * L, *q_THD.shape[1:]))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if rows.padded_rows is None else _FromBlocks.apply(out, rows)


class PackedCoreAttention(torch.nn.Module):
    """``packed_causal_attention`` as Megatron's core attention."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        """Map query, key and value [T, 1, heads, D] to [T, 1, heads * D]."""
        if packed_seq_params is None or query.shape[1] != 1:
            raise ValueError(
                "PackedCoreAttention takes one packed row and its PackedRows, not a padded batch"
            )
        q = query.squeeze(1)
        k = key.squeeze(1)
        v = value.squeeze(1)
        if packed_seq_params.rotary is not None:
            cos, sin = (x.to(q.dtype) for x in packed_seq_params.rotary)
            q = _Rotate.apply(q, cos, sin)
            k = _Rotate.apply(k, cos, sin)
        out = packed_causal_attention(q, k, v, packed_seq_params, self.scale)
        return out.reshape(out.shape[0], 1, -1)
