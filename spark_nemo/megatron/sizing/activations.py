"""Bytes that a forward pass keeps for the backward pass on one rank, and what comes and goes besides.

The count follows the modules of ``layer_spec`` tensor by tensor, as Korthikanti et al. (2022, arXiv:2205.05198) do for
the original transformer; theirs has dropout, GELU and the attention matrix, ours RMSNorm, SwiGLU, grouped queries and
an attention that keeps its inputs and output only (Dao et al., 2022, arXiv:2205.14135). Symbols: T tokens of a
micro-batch, t tensor-parallel ranks, s = t under sequence parallelism and else 1, b bytes of an element, H hidden size,
q and k rows of all query and of all key-value heads, F the MLP's inner size. A layer keeps, in elements per token:

    input of both norms, and their outputs      4 H / s
    fused q, k, v (held by the view that v is)  (q + 2 k) / t
    rotated q and k, and the attention's output (2 q + k) / t
    gate and up, the gate's sigmoid or SiLU, and their product   4 F / t

and in float32 a norm's statistics (2 / s) and the attention's log-sum-exp (heads / t). Differences between the two
layer specs: ours keeps bfloat16 cosines and sines per layer (Megatron's fused rotary keeps one table), rotates inside the
attention, so that ``recompute=selective`` keeps unrotated q instead, and pads sequences of unequal length into blocks
(``PackedRows``: at most about 15 % of the attention's share, not counted).
"""

from __future__ import annotations

from dataclasses import dataclass

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.logprobs import rows_per_chunk
from spark_nemo.megatron.model_shape import ModelShape

from .states import ITEM_BYTES

_PER_TOKEN = 48
"""Bytes per token of a micro-batch that stay whatever the model: its rows of token ids, labels, masks, positions and
extras kept by the embedding and the loss."""


@dataclass(frozen=True)
class ActivationBytes:
    """One micro-batch on one rank, in bytes."""

    kept: int
    """From the forward pass to the backward pass; every micro-batch in flight keeps as much."""
    recomputed: int
    """Kept besides while the backward pass recomputes a layer, one layer at a time."""
    working: int
    """The largest set of gradients and results inside one layer's backward pass. An estimate, not a count."""
    logits: int
    """What the last stage's loss holds while it runs (``megatron/logprobs.py``); 0 on other stages."""

    def peak(self, in_flight: int) -> int:
        """The most alive at once with ``in_flight`` micro-batches."""
        return in_flight * self.kept + max(self.recomputed + self.working, self.logits)


def activation_bytes(shape: ModelShape, layout: MegatronConfig, tokens: int, *, first: bool, last: bool,
                     transformer_engine: bool) -> ActivationBytes:
    """For a micro-batch of ``tokens`` on the ``first``, ``last`` or an inner pipeline stage."""
    item, layers = ITEM_BYTES[layout.dtype], shape.num_layers // layout.pipeline_parallel
    split = layout.tensor_parallel if layout.sequence_parallel else 1
    hidden = tokens // split * shape.hidden_size * item
    kept, recomputed = _layer(shape, layout, tokens, transformer_engine)
    total = layers * kept
    if last:  # the final norm's input and statistics, and its output gathered for the loss
        total += hidden + tokens // split * 4 + tokens * shape.hidden_size * item
    if first or last:
        total += tokens * _PER_TOKEN
    widest = tokens * 2 * shape.ffn_size // layout.tensor_parallel * item
    working = 2 * widest + 2 * tokens * shape.hidden_size * item
    return ActivationBytes(total, recomputed, working, logits_bytes(shape, layout, tokens) if last else 0)


def _layer(shape: ModelShape, layout: MegatronConfig, tokens: int, transformer_engine: bool) -> tuple[int, int]:
    """What one layer keeps, and what it keeps more while it is recomputed."""
    tp = layout.tensor_parallel
    split = tp if layout.sequence_parallel else 1
    item = ITEM_BYTES[layout.dtype]
    q, k = shape.num_heads * shape.head_dim // tp, shape.num_kv_heads * shape.head_dim // tp
    norms = 4 * shape.hidden_size // split * item + 2 * 4 / split
    mlp = 4 * (shape.ffn_size // tp) * item
    tables = 0 if transformer_engine or item == 4 else shape.head_dim * item
    statistics = shape.num_heads // tp * 4
    attention = (3 * q + 3 * k) * item + statistics + tables
    everything = int(tokens * (norms + attention + mlp))
    match layout.recompute:
        case "none":
            return everything, 0
        case "selective" if transformer_engine:  # q, k, v and the output are kept all the same
            return everything - tokens * statistics, tokens * statistics
        case "selective":
            again = tokens * ((q + k) * item + statistics + tables)
            return everything - tokens * (k * item + statistics + tables), again
        case _:
            layer_input = tokens // split * shape.hidden_size * item
            return layer_input, everything - layer_input


def logits_bytes(shape: ModelShape, layout: MegatronConfig, tokens: int) -> int:
    """The larger of the loss's forward pass (a chunk's logits, in float32 and, for the entropy, once more) and its
    backward pass (a chunk's logits, the float32 gradient of this rank's output embedding, and its copies in the
    weights' type)."""
    item = ITEM_BYTES[layout.dtype]
    rows = shape.padded_vocab_size(layout.tensor_parallel) // layout.tensor_parallel
    chunk = min(tokens, rows_per_chunk(rows)) * rows
    copy = item if item != 4 else 0
    embedding = rows * shape.hidden_size
    forward = chunk * (4 + 4 + copy)
    backward = chunk * (4 + copy) + embedding * (4 + item) + tokens * shape.hidden_size * item
    return max(forward, backward)
