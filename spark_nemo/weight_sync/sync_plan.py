"""Where every Hugging Face tensor lies in the trainer and in the engine, worked out from numbers
alone.

``plan_sync`` is a pure function: no process group, no torch. The push follows it (order, buckets,
memory), the checksums are made through its engine view, and tests prove from it that nothing is
left out or written twice.

The trainer's side is Megatron's sharding as ``megatron/hf_weights.py`` writes it: rows of q, k and
v are fused per key-value head (its query heads, the key, the value) and cut into equal pieces, also
when there are more tensor-parallel ranks than key-value heads: then a rank holds a piece of one
group, which may be query rows only (megatron-core 0.16 gathers the product again,
transformer/attention.py). An expert is never cut: it lies whole on one expert-parallel rank.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from spark_nemo.config import ConfigError

from .engine_view import EngineTensor, Slice, engine_tensors
from .numbers import DTYPE_BYTES, ModelNumbers, checkpoint_tensors

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\..+")
QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
WHOLE = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.gate.weight",
    "model.norm.weight",
}
BY_COLUMNS = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
BY_ROWS = {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
VOCABULARY = {"model.embed_tokens.weight", "lm_head.weight"}


@dataclass(frozen=True, slots=True)
class Source:
    """The ranks of one pipeline stage that hold a tensor: ``slices[tp_rank]``, None where a rank
    has nothing of it.
    """

    pp_rank: int
    slices: tuple[Slice | None, ...]
    """Of an expert's tensor one, the whole: tensor-parallel ranks do not share it out."""
    ep_rank: int | None = None
    """The expert-parallel rank that has the expert; None for what is no expert's."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One Hugging Face tensor; every data-parallel replica of the trainer has the same sources.

    Of an expert's tensor, every group of expert-parallel ranks.
    """

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """What goes where, in which order, and how much memory it takes."""

    tensors: tuple[TensorPlan, ...]
    """In the order of the export and of ``buckets``."""
    engine_ranks: tuple[tuple[EngineTensor, ...], ...]
    """For each tensor-parallel rank of an engine, its parameters as slices of Hugging Face tensors.
    """
    buckets: tuple[tuple[str, ...], ...]
    """Names sent together: at most ``bucket_bytes``, or one tensor that is larger."""
    bucket_bytes: int
    buffer_bytes: int
    """The main rank's buffer: the largest bucket that is no single tensor larger than
    ``bucket_bytes``.
    """
    gather_bytes: int
    """The most any rank holds of one Megatron parameter: its gathered shards and the tensors made
    from them.
    """

    @property
    def peak_bytes(self) -> int:
        """The most any rank holds beyond its own share of the model."""
        return self.buffer_bytes + self.gather_bytes

    @property
    def largest_bytes(self) -> int:
        """The largest Hugging Face tensor."""
        return max(tensor.num_bytes for tensor in self.tensors)

    @property
    def total_bytes(self) -> int:
        """The whole model."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_sync(
    tensors: Mapping[str, Sequence[int]],
    dtype: str,
    config: Mapping[str, Any],
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    engine_tensor_parallel: int,
    bucket_bytes: int,
    expert_parallel: int = 1,
) -> SyncPlan:
    """The plan for ``tensors`` (Hugging Face names and shapes, in export order) of ``dtype``.

    Raises ``ConfigError`` naming the tensor that is missing, unknown or misshapen, or the numbers
    that do not divide.
    """
    numbers = ModelNumbers.from_config(config)
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(DTYPE_BYTES)}")
    if bucket_bytes < 1:
        raise ConfigError(f"weight_sync.bucket_bytes={bucket_bytes}: must be positive")
    _check_tensors(tensors, numbers)
    planned = _trainer_side(
        numbers, DTYPE_BYTES[dtype], tensor_parallel, pipeline_parallel, expert_parallel
    )
    by_name = {tensor.name: tensor for tensor in planned}
    ordered = tuple(by_name[name] for name in tensors)
    buckets = _buckets(ordered, bucket_bytes)
    size = {tensor.name: tensor.num_bytes for tensor in ordered}
    totals = [sum(size[name] for name in bucket) for bucket in buckets]
    return SyncPlan(
        ordered,
        tuple(
            engine_tensors(numbers, engine_tensor_parallel, rank)
            for rank in range(engine_tensor_parallel)
        ),
        buckets,
        bucket_bytes,
        max((total for total in totals if total <= bucket_bytes), default=0),
        _gather_bytes(numbers, DTYPE_BYTES[dtype], tensor_parallel),
    )


def _check_tensors(tensors: Mapping[str, Sequence[int]], numbers: ModelNumbers) -> None:
    expected = checkpoint_tensors(numbers)
    for name, shape in tensors.items():
        if name not in expected:
            raise ConfigError(f"tensor {name} has no place in the weight-sync plan of this model")
        if tuple(shape) != expected[name]:
            raise ConfigError(
                f"tensor {name} has shape {tuple(shape)}, config.json says {expected[name]}"
            )
    if missing := [name for name in expected if name not in tensors]:
        raise ConfigError(f"tensor {missing[0]} is missing ({len(missing)} of {len(expected)})")


def check_trainer_layout(numbers: ModelNumbers, tp: int, pp: int, ep: int = 1) -> None:
    """Raise ``ConfigError`` for a split that Megatron refuses (transformer_config.py), naming the
    numbers.
    """
    if numbers.num_heads % tp:
        raise ConfigError(
            f"megatron.tensor_parallel={tp} does not divide the model's {numbers.num_heads} attention "
            "heads"
        )
    if not numbers.experts and numbers.ffn_size % tp:
        raise ConfigError(
            f"megatron.tensor_parallel={tp} does not divide the model's {numbers.ffn_size} ffn rows"
        )
    if ep > 1 and (not numbers.experts or numbers.experts % ep):
        raise ConfigError(
            f"megatron.expert_parallel={ep} does not divide the model's {numbers.experts} experts"
        )
    if numbers.num_kv_heads % tp and tp % numbers.num_kv_heads:
        raise ConfigError(
            f"megatron.tensor_parallel={tp} is neither a divisor nor a multiple of the model's "
            f"{numbers.num_kv_heads} key-value heads"
        )
    fused = numbers.q_rows + 2 * numbers.kv_rows
    if fused % tp:
        raise ConfigError(
            f"megatron.tensor_parallel={tp} does not divide the {fused} rows of the fused q, k and v"
        )
    if numbers.num_layers % pp:
        raise ConfigError(
            f"megatron.pipeline_parallel={pp} does not divide the model's {numbers.num_layers} layers; "
            "uneven stages are not supported"
        )


@functools.lru_cache(maxsize=256)
def _trainer_side(
    numbers: ModelNumbers, itemsize: int, tp: int, pp: int, ep: int
) -> tuple[TensorPlan, ...]:
    check_trainer_layout(numbers, tp, pp, ep)
    per_stage, per_rank = numbers.num_layers // pp, numbers.experts // ep

    @functools.cache
    def slices(part: str, shape: tuple[int, ...]) -> tuple[Slice | None, ...]:
        return _shards(part, shape, numbers, tp)

    @functools.cache
    def whole(shape: tuple[int, ...]) -> Slice:
        return Slice((0, shape[0]), (0, shape[1]))

    def one(name: str, shape: tuple[int, ...]) -> TensorPlan:
        if (match := _LAYER.fullmatch(name)) is not None:
            stages, part = [int(match[1]) // per_stage], match[2]
            if (expert := _EXPERT.fullmatch(part)) is not None:
                source = Source(stages[0], (whole(shape),), int(expert[1]) // per_rank)
                return TensorPlan(name, shape, math.prod(shape) * itemsize, (source,))
        elif name == "model.embed_tokens.weight":
            # Tied, the last stage has a copy of its own as its output layer.
            stages, part = sorted({0, pp - 1}) if numbers.tied else [0], name
        else:
            stages, part = [pp - 1], name
        sources = tuple(Source(stage, slices(part, shape)) for stage in stages)
        return TensorPlan(name, shape, math.prod(shape) * itemsize, sources)

    return tuple(one(name, shape) for name, shape in checkpoint_tensors(numbers).items())


def _shards(
    part: str, shape: tuple[int, ...], numbers: ModelNumbers, tp: int
) -> tuple[Slice | None, ...]:
    """What each tensor-parallel rank of the trainer holds of one Hugging Face tensor."""
    rows = shape[0]
    columns = (0, shape[1]) if len(shape) == 2 else None
    if part in WHOLE:
        return (Slice((0, rows), columns),) * tp
    if part in BY_COLUMNS:
        width = shape[1] // tp
        return tuple(Slice((0, rows), (rank * width, (rank + 1) * width)) for rank in range(tp))
    if part in BY_ROWS or part in VOCABULARY:
        height = -(
            -rows // tp
        )  # of the padded vocabulary; the padding is no part of the checkpoint
        ranges = [(min(rank * height, rows), min((rank + 1) * height, rows)) for rank in range(tp)]
    elif (match := QKV.fullmatch(part)) is not None:
        ranges = [_fused_rows(match[1], rank, tp, numbers) for rank in range(tp)]
    else:
        raise ConfigError(f"tensor {part} has no rule in weight_sync/sync_plan.py")
    return tuple(Slice(found, columns) if found[0] < found[1] else None for found in ranges)


def _fused_rows(which: str, rank: int, tp: int, numbers: ModelNumbers) -> tuple[int, int]:
    """Rows of q, k or v in a rank's piece of the fused parameter; an empty range when it has none
    of them.
    """
    queries = numbers.num_heads // numbers.num_kv_heads * numbers.head_dim
    height = {"q": queries, "k": numbers.head_dim, "v": numbers.head_dim}[which]
    inside = {"q": 0, "k": queries, "v": queries + numbers.head_dim}[which]
    group = queries + 2 * numbers.head_dim
    piece = numbers.num_kv_heads * group // tp
    start, stop = rank * piece, (rank + 1) * piece
    found: list[tuple[int, int]] = []
    for index in range(start // group, -(-stop // group)):
        first = index * group + inside
        low, high = max(start, first), min(stop, first + height)
        if low < high:
            found.append((index * height + low - first, index * height + high - first))
    if any(a[1] != b[0] for a, b in pairwise(found)):
        raise ConfigError(
            f"tensor_parallel={tp} leaves rank {rank} with scattered rows of {which}: {found}"
        )
    return (found[0][0], found[-1][1]) if found else (0, 0)


def _buckets(tensors: Sequence[TensorPlan], bucket_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Consecutive tensors up to ``bucket_bytes``; a larger one travels alone, straight from where
    it is.
    """
    buckets: list[list[str]] = []
    used = bucket_bytes + 1
    for tensor in tensors:
        if used + tensor.num_bytes > bucket_bytes:
            buckets.append([])
            used = 0
        buckets[-1].append(tensor.name)
        used += tensor.num_bytes
    return tuple(tuple(bucket) for bucket in buckets)


def _gather_bytes(numbers: ModelNumbers, itemsize: int, tp: int) -> int:
    """The largest working set of ``hf_weights.export_tensors`` over all parameters.

    A parameter cut by rows is gathered into the Hugging Face tensor itself; one cut by columns, or
    fused, is gathered and then taken apart: twice its size, unless one rank has it whole. So it has
    an expert, which is never gathered.
    """
    hidden = numbers.hidden_size
    vocabulary = -(-numbers.vocab_size // tp) * tp * hidden
    taken_apart = [(numbers.q_rows + 2 * numbers.kv_rows) * hidden, numbers.q_rows * hidden]
    if not numbers.experts:
        taken_apart.append(2 * numbers.ffn_size * hidden)
    never_cut = max(2 * numbers.expert_ffn_size, numbers.experts) * hidden
    return max(vocabulary, max(taken_apart) * (2 if tp > 1 else 1), never_cut) * itemsize
