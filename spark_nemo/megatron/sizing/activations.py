"""Bytes that a forward pass keeps for the backward pass on one rank, and what comes and goes
besides.

The count follows the modules of ``layer_spec`` tensor by tensor, as Korthikanti et al. (2022,
arXiv:2205.05198) do for the original transformer; theirs has dropout, GELU and the attention
matrix, ours RMSNorm, SwiGLU, grouped queries and an attention that keeps its inputs and output only
(Dao et al., 2022, arXiv:2205.14135). Symbols: T tokens of a micro-batch, t tensor-parallel ranks, s
= t under sequence parallelism and else 1, b bytes of an element, H hidden size, q and k rows of all
query and of all key-value heads, F the MLP's inner size. A layer keeps, in elements per token:

    input of both norms, and their outputs      4 H / s
    fused q, k, v (held by the view that v is)  (q + 2 k) / t
    rotated q and k, and the attention's output (2 q + k) / t
    gate and up, the gate's sigmoid or SiLU, and their product   4 F / t

and in float32 a norm's statistics (2 / s) and the attention's log-sum-exp (heads / t). Differences
between the two layer specs: ours keeps bfloat16 cosines and sines per layer (Megatron's fused
rotary keeps one table) and copies sequences of unequal length into padded blocks (``PackedRows``;
the padding, at most about 15 % of the attention's share, is not counted). ``recompute_granularity=selective``
keeps the input of the MLP or of the experts only: the output of the norm before it, or where
Transformer Engine computes that norm inside its MLP, the norm's input, kept anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.logprobs import rows_per_chunk
from spark_nemo.models.spec import ModelSpec

from .states import ITEM_BYTES

_PER_TOKEN = 32
"""Bytes per token that the loss keeps whatever the model: labels, masks, normalisers, extras."""
_EMBEDDED = 16
"""Bytes per token that the embedding keeps: ids, and which of them are another rank's."""


@dataclass(frozen=True)
class ActivationBytes:
    """One micro-batch on one rank, in bytes."""

    kept: int
    """From the forward pass to the backward pass; every micro-batch in flight keeps as much."""
    head: int
    """The part of ``kept`` that the loss and the final norm keep: gone before the backward pass
    reaches a layer.
    """
    recomputed: int
    """Kept besides while the backward pass recomputes a layer, one layer at a time."""
    working: int
    """The largest set of gradients and results inside one layer's backward pass."""
    logits: int
    """What the last stage's loss holds while it runs (``megatron/logprobs.py``); 0 on other stages.
    """

    def graphs(self, in_flight: int) -> int:
        """The most that autograd's graphs hold with ``in_flight`` micro-batches."""
        return in_flight * self.kept + max(0, self.recomputed - self.head)

    def peak(self, in_flight: int) -> int:
        """The most alive at once: in a layer's backward pass or in the loss's."""
        return in_flight * self.kept + max(self.recomputed + self.working - self.head, self.logits)


def activation_bytes(
    spec: ModelSpec,
    layout: MegatronConfig,
    tokens: int,
    *,
    first: bool,
    last: bool,
    transformer_engine: bool,
) -> ActivationBytes:
    """For a micro-batch of ``tokens`` on the ``first``, ``last`` or an inner pipeline stage."""
    item, layers = ITEM_BYTES[layout.dtype], spec.num_layers // layout.pipeline_parallel
    split = layout.tensor_parallel if layout.sequence_parallel else 1
    hidden = tokens // split * spec.hidden_size * item
    kept, recomputed = _layer(spec, layout, tokens, transformer_engine)
    head = tokens * _PER_TOKEN if last else 0
    if last:  # the final norm's input and statistics, and its output gathered for the loss
        head += hidden + tokens // split * 4 + tokens * spec.hidden_size * item
    total = layers * kept + head + (tokens * _EMBEDDED if first else 0)
    width = (
        spec.ffn_size // layout.tensor_parallel
        if spec.experts is None
        else (spec.experts.per_token * spec.experts.ffn_size // split)
    )
    # Gradients of gate, up and their product beside the product; the residual stream's; ours norms
    # in float32.
    norms = 8 if item != 4 and not transformer_engine else 0
    working = tokens * (4 * width * item + spec.hidden_size * (4 * item + norms))
    return ActivationBytes(
        total, head, recomputed, working, logits_bytes(spec, layout, tokens) if last else 0
    )


def _layer(
    spec: ModelSpec, layout: MegatronConfig, tokens: int, transformer_engine: bool
) -> tuple[int, int]:
    """What one layer keeps, and what it keeps more while it is recomputed."""
    tp, item, H = layout.tensor_parallel, ITEM_BYTES[layout.dtype], spec.hidden_size
    split = tp if layout.sequence_parallel else 1
    feed_forward = _feed_forward(spec, layout)
    everything = int(
        tokens
        * (
            4 * H / split * item
            + 8 / split
            + _attention(spec, layout, transformer_engine)
            + feed_forward
        )
    )
    match layout.recompute_granularity:
        case "none":
            return everything, 0
        case "selective":
            norm_inside = transformer_engine and spec.experts is None
            again = int(tokens * (feed_forward + ((H * item + 4) / split if norm_inside else 0)))
            return everything - again, again
        case _:
            layer_input = tokens // split * H * item
            return layer_input, everything - layer_input


def _head_rows(spec: ModelSpec, tp: int) -> tuple[int, int]:
    """Rows of the query and of the key-value heads that one rank works on."""
    return spec.num_heads // tp * spec.head_dim, max(1, spec.num_kv_heads // tp) * spec.head_dim


def _attention(spec: ModelSpec, layout: MegatronConfig, transformer_engine: bool) -> float:
    """Bytes per token. With more ranks than key-value heads Megatron gathers the fused rows of all
    ranks, and what the rank keeps is a view of them.
    """
    tp, item = layout.tensor_parallel, ITEM_BYTES[layout.dtype]
    q, k = _head_rows(spec, tp)
    fused = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    fused = fused if tp > spec.num_kv_heads else fused // tp
    tables = 0 if transformer_engine or item == 4 else spec.head_dim * item
    attention = (fused + 2 * q + k) * item + spec.num_heads // tp * 4 + tables
    if (
        spec.qk_norm
    ):  # the norms' inputs (the key's is a view of the fused rows), and a statistic per head
        attention += q * item + (q + k) // spec.head_dim * 4
        if (
            not transformer_engine
        ):  # blocks of v and of the output beside the rows that they are made from
            attention += (q + k) * item
    return attention


def _feed_forward(spec: ModelSpec, layout: MegatronConfig) -> float:
    """Bytes per token. A token's row is copied for each of its experts, which keep their product
    before and after it is weighted. Counted as if every rank's experts got equally many; the
    router's probabilities are float32.
    """
    item = ITEM_BYTES[layout.dtype]
    if spec.experts is None:
        return 4 * (spec.ffn_size // layout.tensor_parallel) * item
    copies = spec.experts.per_token * (spec.hidden_size + 5 * spec.experts.ffn_size) * item
    router = 3 * 4 * spec.experts.count
    return (copies + router) / (layout.tensor_parallel if layout.sequence_parallel else 1)


def logits_bytes(spec: ModelSpec, layout: MegatronConfig, tokens: int) -> int:
    """The larger of the loss's forward pass (a chunk's logits, in float32 and, for the entropy,
    once more) and its backward pass (a chunk's logits, the float32 gradient of this rank's output
    embedding, and its copies in the weights' type).
    """
    item = ITEM_BYTES[layout.dtype]
    rows = spec.padded_vocab_size(layout.tensor_parallel) // layout.tensor_parallel
    chunk = min(tokens, rows_per_chunk(rows)) * rows
    copy = item if item != 4 else 0
    embedding = rows * spec.hidden_size
    forward = chunk * (4 + max(4, copy))
    backward = max(chunk * (4 + copy), chunk * item + embedding * item) + embedding * 4
    return max(forward, backward + tokens * spec.hidden_size * item)
