"""The Qwen2 decoder: prefill of padded prompts, and one token for every running request.

Fused q/k/v and gate/up products, rotary embedding as one complex product, grouped-query attention
as two batched products against the preallocated cache. Only plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from spark_nemo.models.spec import ModelSpec

from .kv_cache import KVCache, PrefixKV
from .weights import FusedWeights, LayerWeights

MASKED = -1e30
"""Added to scores of positions a row has not written; finite, so that a fully masked padding row
gives no NaN.
"""


class Decoder:
    """A Qwen2 decoder without state: weights and rotary table here, the cache with the caller."""

    def __init__(self, spec: ModelSpec, weights: FusedWeights, max_context: int) -> None:
        self.spec = spec
        self.weights = weights
        half = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
        angles_TP = torch.arange(max_context, dtype=torch.float32)[:, None] * (
            1.0 / spec.rope_theta**half
        )
        self._rotary_TP = torch.polar(torch.ones_like(angles_TP), angles_TP)

    def _project_qkv(
        self, layer: LayerWeights, x_NH: torch.Tensor, rotary_N1P: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return q, k, v of shape (N, heads, D); q and k are rotated, q is scaled."""
        spec = self.spec
        normed_NH = F.rms_norm(x_NH, (spec.hidden_size,), layer.attn_norm_H, spec.norm_eps)
        qkv_NAD = torch.addmm(layer.qkv_bias_Q, normed_NH, layer.qkv_HQ).unflatten(
            1, (-1, spec.head_dim)
        )
        qk_NAD = qkv_NAD[:, : spec.num_heads + spec.num_kv_heads]
        torch.view_as_complex(qk_NAD.unflatten(2, (-1, 2))).mul_(rotary_N1P)
        return list(qkv_NAD.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1))

    def _finish_layer(
        self, layer: LayerWeights, x_NH: torch.Tensor, attended_NQ: torch.Tensor
    ) -> torch.Tensor:
        """Apply output projection, residual, SwiGLU, residual."""
        spec = self.spec
        x_NH = torch.addmm(x_NH, attended_NQ, layer.out_QH)
        normed_NH = F.rms_norm(x_NH, (spec.hidden_size,), layer.mlp_norm_H, spec.norm_eps)
        gate_NF, up_NF = torch.mm(normed_NH, layer.gate_up_HF).chunk(2, dim=1)
        return torch.addmm(x_NH, F.silu(gate_NF).mul_(up_NF), layer.down_FH)

    def decode(
        self, tokens_N: torch.Tensor, positions_N: torch.Tensor, cache: KVCache, length: int
    ) -> torch.Tensor:
        """Feed one token per row 0..N-1 at ``positions_N`` and return the logits (N, V).

        Attention reads ``length`` positions of the cache: positions < length <= cache.length.
        """
        spec = self.spec
        rows = tokens_N.shape[0]
        groups = spec.num_heads // spec.num_kv_heads
        rotary_N1P = self._rotary_TP[positions_N].unsqueeze(1)
        rows_N = torch.arange(rows)
        bias_NT = torch.where(torch.arange(length) <= positions_N[:, None], 0.0, MASKED)
        bias_CGT = (
            bias_NT[:, None, None]
            .expand(rows, spec.num_kv_heads, groups, length)
            .reshape(-1, groups, length)
        )
        x_NH = self.weights.embed_VH[tokens_N]
        for index, layer in enumerate(self.weights.layers):
            q_NAD, k_NKD, v_NKD = self._project_qkv(layer, x_NH, rotary_N1P)
            keys_NKDT = cache.k_LSKDT[index, :rows]
            values_NKTD = cache.v_LSKTD[index, :rows]
            keys_NKDT[rows_N, :, :, positions_N] = k_NKD
            values_NKTD[rows_N, :, positions_N] = v_NKD
            q_CGD = q_NAD.reshape(-1, groups, spec.head_dim)
            scores_CGT = torch.baddbmm(bias_CGT, q_CGD, keys_NKDT.flatten(0, 1)[:, :, :length])
            out_CGD = torch.bmm(scores_CGT.softmax(-1), values_NKTD.flatten(0, 1)[:, :length])
            x_NH = self._finish_layer(layer, x_NH, out_CGD.view(rows, -1))
        x_NH = F.rms_norm(x_NH, (spec.hidden_size,), self.weights.norm_H, spec.norm_eps)
        return torch.mm(x_NH, self.weights.head_HV)

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[PrefixKV]:
        """Compute keys and values of all prompts (each of at least one token) as one batch.

        The batch is padded on the right, where causality keeps the padding out of real positions.
        """
        spec = self.spec
        count = len(prompts)
        length = max(len(ids) for ids in prompts)
        tokens_BT = torch.tensor([ids + (0,) * (length - len(ids)) for ids in prompts])
        rotary_N1P = self._rotary_TP[:length].repeat(count, 1).unsqueeze(1)
        x_NH = self.weights.embed_VH[tokens_BT.flatten()]
        keys = []
        values = []
        for index, layer in enumerate(self.weights.layers):
            q_BATD, k_BKTD, v_BKTD = (
                part.unflatten(0, (count, length)).transpose(1, 2)
                for part in self._project_qkv(layer, x_NH, rotary_N1P)
            )
            keys.append(k_BKTD.transpose(2, 3))
            values.append(v_BKTD)
            # Only keys and values are needed: the last layer's output is not used.
            if index + 1 < spec.num_layers:
                out_BATD = F.scaled_dot_product_attention(
                    q_BATD, k_BKTD, v_BKTD, is_causal=True, scale=1.0, enable_gqa=True
                )
                x_NH = self._finish_layer(
                    layer, x_NH, out_BATD.transpose(1, 2).flatten(0, 1).flatten(1)
                )
        return [
            PrefixKV(
                torch.stack([k[row, :, :, : len(ids)] for k in keys]),
                torch.stack([v[row, :, : len(ids)] for v in values]),
            )
            for row, ids in enumerate(prompts)
        ]
