"""SGLang's parameters as slices of Hugging Face tensors, rank by rank of its tensor parallelism.

Read from sglang 0.5.21 (srt/layers/linear.py, srt/layers/vocab_parallel_embedding.py, srt/models/):
q, k and v lie below each other in ``qkv_proj``, gate and up in ``gate_up_proj``; o_proj and
down_proj are cut by columns; the vocabulary is padded with zero rows to a multiple of 64; a
key-value head is on several ranks when there are more ranks than heads. Experts
(srt/layers/moe/fused_moe_triton/layer.py) lie below each other: each one's share of gate and of up
in ``w13_weight``, of down in ``w2_weight``; the router is whole on every rank. So they lie for
SGLang's Triton kernels, which it takes by default on GPUs before Blackwell; ``check_server_args``
refuses the arguments that ask for others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.config import ConfigError

from .numbers import ModelNumbers

VOCABULARY_PADDING = 64
_OTHER_EXPERTS = (
    "--ep",
    "--ep-size",
    "--expert-parallel-size",
    "--moe-a2a-backend",
    "--moe-dp-size",
    "--moe-data-parallel-size",
    "--enable-eplb",
    "--ep-num-redundant-experts",
    "--init-expert-location",
)
"""Arguments with which a rank of SGLang holds some experts whole, or several copies of one."""
_RUNNER, _RUNNERS = "--moe-runner-backend", ("auto", "triton")


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows and columns [start, stop) of a tensor; a vector has rows only."""

    rows: tuple[int, int]
    columns: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Number of columns; 1 for a vector."""
        return 1 if self.columns is None else self.columns[1] - self.columns[0]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of an engine tensor: a slice of a Hugging Face tensor, or zeros (``name`` None) of that
    many rows.
    """

    name: str | None
    slice: Slice


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """One parameter of one engine rank: its pieces from the first row to the last.

    With three axes (expert, row, column) the rows are those of all experts, one expert after the
    other.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def check_engine_layout(numbers: ModelNumbers, tp: int) -> None:
    """Raise ``ConfigError`` for a split that SGLang refuses, naming the numbers."""
    ffn = (
        (numbers.expert_ffn_size, "ffn rows of an expert")
        if numbers.experts
        else (numbers.ffn_size, "ffn rows")
    )
    for count, what in ((numbers.num_heads, "attention heads"), ffn):
        if count % tp:
            raise ConfigError(
                f"an engine of {tp} tensor-parallel ranks does not divide the model's {count} {what}"
            )
    if 0 < numbers.experts < tp:
        raise ConfigError(
            f"an engine of {tp} tensor-parallel ranks needs as many experts, the model has "
            f"{numbers.experts}"
        )
    if numbers.num_kv_heads % tp and tp % numbers.num_kv_heads:
        raise ConfigError(
            f"an engine of {tp} tensor-parallel ranks is neither a divisor nor a multiple of the "
            f"model's {numbers.num_kv_heads} key-value heads"
        )
    if _padded_vocabulary(numbers) % tp:
        raise ConfigError(
            f"an engine of {tp} tensor-parallel ranks does not divide the vocabulary of "
            f"{_padded_vocabulary(numbers)} (padded)"
        )


def check_server_args(numbers: ModelNumbers, words: Sequence[str], name: str) -> None:
    """Raise ``ConfigError`` for arguments under which SGLang lays experts out in another way;
    ``name`` is their field.

    With expert parallelism a rank has some experts whole; other kernels than Triton's have up
    before gate, or blocks of both, and 0.5.21 cannot load new weights into all of those.
    """
    if not numbers.experts:
        return
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in _OTHER_EXPERTS:
            raise ConfigError(
                f"{name}: {flag} spreads a model's experts over an engine's ranks in a way that weight "
                "sync has no plan for: take it out, experts are cut by tensor parallelism"
            )
        value = value or "".join(words[index + 1 : index + 2])
        if flag == _RUNNER and value not in _RUNNERS:
            raise ConfigError(
                f"{name}: {_RUNNER} {value} stores experts in an order of its own, which weight sync has "
                "no plan for: use triton"
            )


def _padded_vocabulary(numbers: ModelNumbers) -> int:
    return -(-numbers.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING


@functools.lru_cache(maxsize=256)
def engine_tensors(numbers: ModelNumbers, tp: int, rank: int) -> tuple[EngineTensor, ...]:
    """The parameters of engine rank ``rank`` of ``tp``. Raises ``ConfigError`` when the model
    cannot be split so.
    """
    check_engine_layout(numbers, tp)
    layer = _layer_tensors(numbers, tp, rank)

    def named(prefix: str, tensor: EngineTensor) -> EngineTensor:
        pieces = tuple(Piece(f"{prefix}{piece.name}", piece.slice) for piece in tensor.pieces)
        return EngineTensor(f"{prefix}{tensor.name}", tensor.shape, pieces)

    tensors = [_vocabulary("model.embed_tokens.weight", numbers, tp, rank)]
    tensors += [
        named(f"model.layers.{index}.", tensor)
        for index in range(numbers.num_layers)
        for tensor in layer
    ]
    tensors.append(_whole("model.norm.weight", numbers.hidden_size))
    if (
        not numbers.tied
    ):  # tied, SGLang's lm_head is the embedding itself and has no name of its own
        tensors.append(_vocabulary("lm_head.weight", numbers, tp, rank))
    return tuple(tensors)


def _layer_tensors(numbers: ModelNumbers, tp: int, rank: int) -> list[EngineTensor]:
    hidden = numbers.hidden_size
    q = numbers.q_rows // tp
    kv = max(1, numbers.num_kv_heads // tp) * numbers.head_dim
    kv_rank = rank // max(1, tp // numbers.num_kv_heads)
    own = {
        "q": (rank * q, (rank + 1) * q),
        "k": (kv_rank * kv, (kv_rank + 1) * kv),
        "v": (kv_rank * kv, (kv_rank + 1) * kv),
    }

    def stacked(name: str, parts: dict[str, tuple[int, int]], columns: int | None) -> EngineTensor:
        pieces = tuple(
            Piece(part, Slice(rows, None if columns is None else (0, columns)))
            for part, rows in parts.items()
        )
        height = sum(piece.slice.height for piece in pieces)
        return EngineTensor(name, (height,) if columns is None else (height, columns), pieces)

    tensors = [
        _whole("input_layernorm.weight", hidden),
        stacked(
            "self_attn.qkv_proj.weight",
            {f"self_attn.{x}_proj.weight": rows for x, rows in own.items()},
            hidden,
        ),
    ]
    if numbers.qkv_bias:
        tensors.append(
            stacked(
                "self_attn.qkv_proj.bias",
                {f"self_attn.{x}_proj.bias": rows for x, rows in own.items()},
                None,
            )
        )
    if numbers.qk_norm:
        tensors += [_whole(f"self_attn.{x}_norm.weight", numbers.head_dim) for x in "qk"]
    return [
        *tensors,
        _by_columns("self_attn.o_proj.weight", hidden, q, rank),
        _whole("post_attention_layernorm.weight", hidden),
        *_feed_forward(numbers, tp, rank),
    ]


def _feed_forward(numbers: ModelNumbers, tp: int, rank: int) -> list[EngineTensor]:
    hidden, width = numbers.hidden_size, (numbers.expert_ffn_size or numbers.ffn_size) // tp
    rows = Slice((rank * width, (rank + 1) * width), (0, hidden))
    if not numbers.experts:
        gate_up = tuple(Piece(f"mlp.{x}_proj.weight", rows) for x in ("gate", "up"))
        return [
            EngineTensor("mlp.gate_up_proj.weight", (2 * width, hidden), gate_up),
            _by_columns("mlp.down_proj.weight", hidden, width, rank),
        ]
    each = [f"mlp.experts.{expert}." for expert in range(numbers.experts)]
    columns = Slice((0, hidden), (rank * width, (rank + 1) * width))
    return [
        EngineTensor(
            "mlp.gate.weight",
            (numbers.experts, hidden),
            (Piece("mlp.gate.weight", Slice((0, numbers.experts), (0, hidden))),),
        ),
        EngineTensor(
            "mlp.experts.w13_weight",
            (numbers.experts, 2 * width, hidden),
            tuple(
                Piece(f"{expert}{x}_proj.weight", rows) for expert in each for x in ("gate", "up")
            ),
        ),
        EngineTensor(
            "mlp.experts.w2_weight",
            (numbers.experts, hidden, width),
            tuple(Piece(f"{expert}down_proj.weight", columns) for expert in each),
        ),
    ]


def _by_columns(name: str, rows: int, width: int, rank: int) -> EngineTensor:
    piece = Piece(name, Slice((0, rows), (rank * width, (rank + 1) * width)))
    return EngineTensor(name, (rows, width), (piece,))


def _whole(name: str, rows: int) -> EngineTensor:
    return EngineTensor(name, (rows,), (Piece(name, Slice((0, rows))),))


def _vocabulary(name: str, numbers: ModelNumbers, tp: int, rank: int) -> EngineTensor:
    height, columns = _padded_vocabulary(numbers) // tp, (0, numbers.hidden_size)
    start = min(rank * height, numbers.vocab_size)
    stop = min((rank + 1) * height, numbers.vocab_size)
    pieces = [Piece(name, Slice((start, stop), columns))] if start < stop else []
    if missing := height - (stop - start):
        pieces.append(Piece(None, Slice((0, missing), columns)))
    return EngineTensor(name, (height, numbers.hidden_size), tuple(pieces))
