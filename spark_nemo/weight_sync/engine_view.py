"""SGLang's parameters as slices of Hugging Face tensors, for each of its tensor-parallel ranks.

Read from sglang 0.5.21 (srt/layers/linear.py, srt/layers/vocab_parallel_embedding.py, srt/models/):

- q, k and v are stacked in ``qkv_proj``, gate and up in ``gate_up_proj``;
- o_proj and down_proj are cut by columns;
- the vocabulary is padded with zero rows to a multiple of 64;
- with more ranks than key-value heads, several ranks hold the same head;
- experts (srt/layers/moe/fused_moe_triton/layer.py) are stacked: each expert's rows of gate and up
  in ``w13_weight``, its columns of down in ``w2_weight``; the router is whole on every rank.

The layout of experts is that of SGLang's Triton kernels, its default on GPUs before Blackwell;
``check_server_args`` rejects arguments that select another one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.config import ConfigError
from spark_nemo.models.param_mapping import ParamRule, Split, is_output_layer, param_rules
from spark_nemo.models.spec import ModelSpec

VOCABULARY_PADDING = 64
_EXPERT_LAYOUT_FLAGS = (
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
_MOE_RUNNER_FLAG = "--moe-runner-backend"
_SUPPORTED_MOE_RUNNERS = ("auto", "triton")


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
    """Rows of an engine tensor: a slice of the Hugging Face tensor ``name``, or zeros if None."""

    name: str | None
    slice: Slice


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """One parameter of one engine rank: its pieces from the first row to the last.

    With three axes (expert, row, column) the rows of all experts follow each other.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def check_syncable(spec: ModelSpec, source: str = "config.json") -> None:
    """Raise ``ConfigError`` for a model whose weights SGLang cannot load during a run."""
    if spec.experts is not None and spec.tied_embeddings:
        # srt/models/qwen3_moe.py creates a head of its own and reads it from the checkpoint, which
        # does not have one.
        raise ConfigError(
            f"{source}: tie_word_embeddings=true with experts is not supported by weight sync: SGLang "
            "0.5.21 does not tie the head of a Qwen3-MoE; save the model with a head of its own"
        )


def check_engine_layout(spec: ModelSpec, tp: int) -> None:
    """Raise ``ConfigError`` if SGLang cannot split the model over ``tp`` ranks."""
    engine = f"an engine of {tp} tensor-parallel ranks"
    if spec.experts is None:
        ffn_rows = (spec.ffn_size, "ffn rows")
    else:
        ffn_rows = (spec.experts.ffn_size, "ffn rows of an expert")
    for count, what in ((spec.num_heads, "attention heads"), ffn_rows):
        if count % tp:
            raise ConfigError(f"{engine} does not divide the model's {count} {what}")
    if spec.experts is not None and spec.experts.count < tp:
        raise ConfigError(f"{engine} needs as many experts, the model has {spec.experts.count}")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise ConfigError(
            f"{engine} is neither a divisor nor a multiple of the model's {spec.num_kv_heads} "
            "key-value heads"
        )
    vocabulary = spec.padded_vocab_size(VOCABULARY_PADDING)
    if vocabulary % tp:
        raise ConfigError(f"{engine} does not divide the vocabulary of {vocabulary} (padded)")


def check_server_args(spec: ModelSpec, words: Sequence[str], field: str) -> None:
    """Raise ``ConfigError`` for server arguments under which SGLang lays out experts differently.

    With expert parallelism a rank has some experts whole. Kernels other than Triton's store up
    before gate, or blocks of both, and SGLang 0.5.21 cannot load new weights into all of those.
    """
    if spec.experts is None:
        return
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in _EXPERT_LAYOUT_FLAGS:
            raise ConfigError(
                f"{field}: {flag} spreads experts over an engine's ranks in a layout that weight sync "
                "does not support: remove it, experts are cut by tensor parallelism"
            )
        if flag != _MOE_RUNNER_FLAG:
            continue
        if not value and index + 1 < len(words):
            value = words[index + 1]
        if value not in _SUPPORTED_MOE_RUNNERS:
            raise ConfigError(
                f"{field}: {_MOE_RUNNER_FLAG} {value} stores experts in a layout that weight sync does "
                "not support: use triton"
            )


@functools.lru_cache(maxsize=256)
def engine_tensors(spec: ModelSpec, tp: int, rank: int) -> tuple[EngineTensor, ...]:
    """Return the parameters of engine rank ``rank`` of ``tp``.

    Raises ``ConfigError`` if SGLang cannot split the model over ``tp`` ranks.
    """
    check_engine_layout(spec, tp)
    rules = param_rules(spec)
    tensors = [_dense_tensor(rule, spec, tp, rank) for rule in rules.first]
    layer = [
        _expert_tensor(rule, spec, tp, rank)
        if rule.per_expert
        else _dense_tensor(rule, spec, tp, rank)
        for rule in rules.layer
    ]
    for index in range(spec.num_layers):
        tensors += [_in_layer(tensor, index) for tensor in layer]
    for rule in rules.last:
        # SGLang's tied lm_head is the embedding itself, without a name of its own.
        if not (is_output_layer(rule) and spec.tied_embeddings):
            tensors.append(_dense_tensor(rule, spec, tp, rank))
    return tuple(tensors)


def _in_layer(tensor: EngineTensor, layer: int) -> EngineTensor:
    pieces = []
    for piece in tensor.pieces:
        assert piece.name is not None  # only vocabularies are padded
        pieces.append(Piece(piece.name.format(layer=layer), piece.slice))
    return EngineTensor(tensor.name.format(layer=layer), tensor.shape, tuple(pieces))


def _dense_tensor(rule: ParamRule, spec: ModelSpec, tp: int, rank: int) -> EngineTensor:
    first_name = next(iter(rule.hf_shapes))
    match rule.split:
        case Split.QKV:
            name = first_name.replace("q_proj", "qkv_proj")
        case Split.GATE_UP:
            name = first_name.replace("gate_proj", "gate_up_proj")
        case _:
            name = first_name
    pieces = tuple(_pieces(rule, spec, tp, rank))
    rows = sum(piece.slice.height for piece in pieces)
    is_vector = pieces[0].slice.columns is None
    return EngineTensor(name, (rows,) if is_vector else (rows, pieces[0].slice.width), pieces)


def _expert_tensor(rule: ParamRule, spec: ModelSpec, tp: int, rank: int) -> EngineTensor:
    """Stack one rule's tensors of all experts."""
    assert spec.experts is not None
    of_one = _pieces(rule, spec, tp, rank)
    pieces = []
    for expert in range(spec.experts.count):
        for piece in of_one:
            # Not format: the layer is filled in later.
            name = str(piece.name).replace("{expert}", str(expert))
            pieces.append(Piece(name, piece.slice))
    rows = sum(piece.slice.height for piece in of_one)
    prefix = next(iter(rule.hf_shapes)).partition("{expert}")[0]
    name = prefix + ("w13_weight" if rule.split is Split.GATE_UP else "w2_weight")
    return EngineTensor(name, (spec.experts.count, rows, of_one[0].slice.width), tuple(pieces))


def _pieces(rule: ParamRule, spec: ModelSpec, tp: int, rank: int) -> list[Piece]:
    """Return one rank's slices of a rule's tensors, in the order in which SGLang stacks them."""
    pieces = []
    for name, shape in rule.hf_shapes.items():
        rows = (0, shape[0])
        columns = (0, shape[1]) if len(shape) == 2 else None
        match rule.split:
            case Split.REPLICATED:
                pass
            case Split.COLUMNS:
                columns = _share(shape[1], tp, rank)
            case Split.QKV if ".q_proj." not in name:
                # With more ranks than heads, consecutive ranks share a head.
                holders = min(tp, spec.num_kv_heads)
                rows = _share(shape[0], holders, rank * holders // tp)
            case Split.QKV | Split.GATE_UP:
                rows = _share(shape[0], tp, rank)
            case Split.VOCAB_ROWS:
                return _vocabulary_pieces(name, spec, tp, rank)
        pieces.append(Piece(name, Slice(rows, columns)))
    return pieces


def _share(size: int, ranks: int, rank: int) -> tuple[int, int]:
    return rank * size // ranks, (rank + 1) * size // ranks


def _vocabulary_pieces(name: str, spec: ModelSpec, tp: int, rank: int) -> list[Piece]:
    columns = (0, spec.hidden_size)
    start, stop = _share(spec.padded_vocab_size(VOCABULARY_PADDING), tp, rank)
    real_start = min(start, spec.vocab_size)
    real_stop = min(stop, spec.vocab_size)
    pieces = []
    if real_start < real_stop:
        pieces.append(Piece(name, Slice((real_start, real_stop), columns)))
    padding = (stop - start) - (real_stop - real_start)
    if padding:
        pieces.append(Piece(None, Slice((0, padding), columns)))
    return pieces
