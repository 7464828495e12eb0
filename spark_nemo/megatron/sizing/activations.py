"""Bytes that a forward pass keeps for the backward pass on one rank, and short-lived memory.

The count follows the modules of ``layer_spec`` tensor by tensor, as Korthikanti et al. (2022,
arXiv:2205.05198) do for the original transformer. Theirs has dropout, GELU and the attention
matrix; ours has RMSNorm, SwiGLU, grouped queries and an attention that keeps only its inputs and
output (Dao et al., 2022, arXiv:2205.14135).

Symbols: T tokens of a micro-batch, t tensor-parallel ranks, s = t under sequence parallelism and
else 1, b bytes of an element, H hidden size, q and k rows of all query and of all key-value heads, F
the MLP's inner size. A layer keeps, in elements per token:

    input of both norms, and their outputs      4 H / s
    fused q, k, v (held by the view that v is)  (q + 2 k) / t
    rotated q and k, and the attention's output (2 q + k) / t
    gate and up, the gate's sigmoid or SiLU, and their product   4 F / t

and in float32 a norm's statistics (2 / s) and the attention's log-sum-exp (heads / t).

The two layer specs differ: ours keeps bfloat16 cosines and sines per layer (Megatron's fused rotary
keeps one table) and copies sequences of unequal length into padded blocks (``PackedRows``; the
padding, at most about 15 % of the attention's share, is not counted).
``recompute_granularity=selective`` keeps only the input of the MLP or of the experts: the output of
the norm before it, or, where Transformer Engine computes that norm inside its MLP, the norm's input,
which is kept anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.logprobs import rows_per_chunk
from spark_nemo.models.spec import ModelSpec

from .states import ITEM_BYTES

_LOSS_BYTES_PER_TOKEN = 32
"""Kept by the loss for every model: labels, masks, normalisers, extras."""
_EMBEDDING_BYTES_PER_TOKEN = 16
"""Kept by the embedding: ids, and which of them belong to another rank."""


@dataclass(frozen=True)
class ActivationBytes:
    """Activations of one micro-batch on one rank, in bytes."""

    kept: int
    """From the forward to the backward pass; every micro-batch in flight keeps this much."""
    head: int
    """Share of ``kept`` for the loss and the final norm, freed before a layer's backward pass."""
    recomputed: int
    """Kept in addition while the backward pass recomputes a layer, one layer at a time."""
    working: int
    """Largest set of gradients and results inside one layer's backward pass."""
    logits: int
    """Held by the last stage's loss (``megatron/logprobs.py``); 0 on other stages."""

    def graphs(self, in_flight: int) -> int:
        """Return the most that autograd's graphs hold with ``in_flight`` micro-batches."""
        return in_flight * self.kept + max(0, self.recomputed - self.head)

    def peak(self, in_flight: int) -> int:
        """Return the most alive at once, in a layer's backward pass or in the loss's."""
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
    """Count a micro-batch of ``tokens`` on the ``first``, ``last`` or an inner pipeline stage."""
    item = ITEM_BYTES[layout.dtype]
    num_layers = spec.num_layers // layout.pipeline_parallel
    split = layout.tensor_parallel if layout.sequence_parallel else 1
    layer_kept, recomputed = _layer(spec, layout, tokens, transformer_engine)
    kept = num_layers * layer_kept
    head = 0
    logits = 0
    if first:
        kept += tokens * _EMBEDDING_BYTES_PER_TOKEN
    if last:
        # The final norm's input and statistics, and its output gathered for the loss.
        norm_input = tokens // split * spec.hidden_size * item
        statistics = tokens // split * 4
        gathered = tokens * spec.hidden_size * item
        head = tokens * _LOSS_BYTES_PER_TOKEN + norm_input + statistics + gathered
        kept += head
        logits = logits_bytes(spec, layout, tokens)
    if spec.experts is None:
        width = spec.ffn_size // layout.tensor_parallel
    else:
        width = spec.experts.per_token * spec.experts.ffn_size // split
    # Our norms compute in float32.
    norms = 8 if item != 4 and not transformer_engine else 0
    # Gradients of gate, up and their product, the product itself, and the residual stream's.
    working = tokens * (4 * width * item + spec.hidden_size * (4 * item + norms))
    return ActivationBytes(kept, head, recomputed, working, logits)


def _layer(
    spec: ModelSpec, layout: MegatronConfig, tokens: int, transformer_engine: bool
) -> tuple[int, int]:
    """Return the bytes that one layer keeps, and those it keeps more while it is recomputed."""
    tp = layout.tensor_parallel
    item = ITEM_BYTES[layout.dtype]
    H = spec.hidden_size
    split = tp if layout.sequence_parallel else 1
    feed_forward = _feed_forward(spec, layout)
    attention = _attention(spec, layout, transformer_engine)
    norms = 4 * H / split * item + 8 / split
    everything = int(tokens * (norms + attention + feed_forward))
    match layout.recompute_granularity:
        case "none":
            return everything, 0
        case "selective":
            norm_inside_mlp = transformer_engine and spec.experts is None
            norm = (H * item + 4) / split if norm_inside_mlp else 0
            recomputed = int(tokens * (feed_forward + norm))
            return everything - recomputed, recomputed
        case _:
            layer_input = tokens // split * H * item
            return layer_input, everything - layer_input


def _attention(spec: ModelSpec, layout: MegatronConfig, transformer_engine: bool) -> float:
    """Return the attention's bytes per token."""
    tp = layout.tensor_parallel
    item = ITEM_BYTES[layout.dtype]
    q = spec.num_heads // tp * spec.head_dim
    k = max(1, spec.num_kv_heads // tp) * spec.head_dim
    fused = spec.q_rows + 2 * spec.kv_rows
    # With more ranks than key-value heads Megatron gathers the fused rows of all ranks, and the rank
    # keeps a view of them.
    if tp <= spec.num_kv_heads:
        fused //= tp
    rotary_tables = 0 if transformer_engine or item == 4 else spec.head_dim * item
    attention = (fused + 2 * q + k) * item + spec.num_heads // tp * 4 + rotary_tables
    if spec.qk_norm:
        # The norms' inputs (the key's is a view of the fused rows), and a statistic per head.
        attention += q * item + (q + k) // spec.head_dim * 4
        if not transformer_engine:
            # Blocks of v and of the output, and the rows that they are made from.
            attention += (q + k) * item
    return attention


def _feed_forward(spec: ModelSpec, layout: MegatronConfig) -> float:
    """Return the feed-forward network's bytes per token.

    A token's row is copied for each of its experts, which keep their product before and after it is
    weighted. Tokens are counted as evenly divided over the ranks' experts.
    """
    item = ITEM_BYTES[layout.dtype]
    if spec.experts is None:
        return 4 * (spec.ffn_size // layout.tensor_parallel) * item
    copies = spec.experts.per_token * (spec.hidden_size + 5 * spec.experts.ffn_size) * item
    router = 3 * 4 * spec.experts.count  # float32 probabilities
    return (copies + router) / (layout.tensor_parallel if layout.sequence_parallel else 1)


def logits_bytes(spec: ModelSpec, layout: MegatronConfig, tokens: int) -> int:
    """Return the larger of the loss's forward and backward pass.

    Forward: a chunk's logits in float32, and once more for the entropy. Backward: a chunk's logits,
    the float32 gradient of this rank's output embedding, and its copies in the weights' type.
    """
    item = ITEM_BYTES[layout.dtype]
    vocab_rows = spec.padded_vocab_size(layout.tensor_parallel) // layout.tensor_parallel
    chunk = min(tokens, rows_per_chunk(vocab_rows)) * vocab_rows
    copy = item if item != 4 else 0
    embedding = vocab_rows * spec.hidden_size
    forward = chunk * (4 + max(4, copy))
    backward = max(chunk * (4 + copy), chunk * item + embedding * item) + embedding * 4
    return max(forward, backward + tokens * spec.hidden_size * item)
