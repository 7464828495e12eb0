"""Trainer layouts that fit a cluster; shortage of the others and the settings that would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from spark_nemo.config import ConfigError, MegatronConfig
from spark_nemo.megatron.sizing.rank import RankMemory, rank_memory, worst_rank

from .cluster import GB, Cluster, Rates
from .step_time import training_seconds
from .workload import Training

RECOMPUTE = ("none", "selective", "full")
_MAX_PIPELINE = 16


@dataclass(frozen=True)
class Candidate:
    """One layout with the memory of its worst rank and the seconds of its phases."""

    layout: MegatronConfig
    worst: RankMemory
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Seconds of the trainer's phases together."""
        return sum(self.seconds.values())

    def shortage(self, cluster: Cluster) -> int:
        """Return the bytes that the worst rank lacks; a negative number is left over."""
        return self.worst.peak - cluster.usable_bytes


@dataclass(frozen=True)
class MemoryModel:
    """Inputs of a rank's memory besides the layout."""

    work: Training
    sync_bytes: int = 0
    transformer_engine: bool = True

    def worst_rank(self, layout: MegatronConfig) -> RankMemory:
        """Return the largest rank of ``layout``. Raises ``ConfigError`` for an impossible split."""
        ranks = rank_memory(
            self.work.model.spec,
            layout,
            self.work.batch(layout.data_parallel, layout.tokens_per_micro_batch),
            transformer_engine=self.transformer_engine,
            sync_bytes=self.sync_bytes,
            snapshots=self.work.snapshots,
        )
        return worst_rank(ranks)


def evaluate(
    memory: MemoryModel, layout: MegatronConfig, cluster: Cluster, rates: Rates
) -> Candidate:
    """Return memory and times of a layout. Raises ``ConfigError`` for an impossible split."""
    worst = memory.worst_rank(layout)
    return Candidate(layout, worst, training_seconds(memory.work, layout, worst, cluster, rates))


def candidates(
    memory: MemoryModel, base: MegatronConfig, gpus: int, cluster: Cluster, rates: Rates
) -> list[Candidate]:
    """Return every possible layout of all ``gpus``, fastest first, whether it fits or not.

    Tensor parallel stays in a node and is a power of two. dtype, optimizer and micro-batches are
    those of ``base``.
    """
    found = []
    for tensor_parallel, pipeline_parallel, expert_parallel in _sizes(memory.work, gpus, cluster):
        for recompute in RECOMPUTE:
            layout = replace(
                base,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
                data_parallel=gpus // (tensor_parallel * pipeline_parallel),
                expert_parallel=expert_parallel,
                sequence_parallel=tensor_parallel > 1,
                recompute_granularity=recompute,
            )
            try:
                found.append(evaluate(memory, layout, cluster, rates))
            except ConfigError:
                continue  # the model cannot be split this way
    return sorted(found, key=_speed)


def advice(memory: MemoryModel, layout: MegatronConfig, usable_bytes: int) -> list[str]:
    """Return one line for each setting that needs less memory than ``layout``.

    Settings that make it fit come first, then settings that do not need more GPUs.
    """
    peak = memory.worst_rank(layout).peak
    lines = []
    for order, (text, other) in enumerate(_alternatives(memory.work, layout)):
        try:
            other_peak = memory.worst_rank(other).peak
        except ConfigError:
            continue
        if other_peak >= peak:
            continue
        missing = other_peak - usable_bytes
        verdict = "fits" if missing <= 0 else f"lacks {missing / GB:.1f} GB"
        line = f"{text} saves {(peak - other_peak) / GB:.1f} GB: {verdict}"
        more_gpus = other.world_size > layout.world_size
        lines.append((missing > 0, more_gpus, order, line))
    longest = _longest_that_fits(memory, layout, usable_bytes)
    if longest:
        planned = memory.work.longest
        line = f"sequences and micro-batches of {longest:,} tokens instead of {planned:,}: fits"
        lines.append((False, False, 1, line))  # after recomputation
    return [line for *_, line in sorted(lines)]


def _speed(candidate: Candidate) -> tuple[float, int]:
    recompute = RECOMPUTE.index(candidate.layout.recompute_granularity)
    return candidate.step_seconds, recompute


def _sizes(work: Training, gpus: int, cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    """Yield tensor, pipeline and expert parallel sizes that divide the GPUs and the model."""
    spec = work.model.spec
    num_experts = spec.experts.count if spec.experts else 1
    tensor_parallel = 1
    while tensor_parallel <= cluster.gpus_per_node:
        for pipeline_parallel in range(1, min(_MAX_PIPELINE, spec.num_layers) + 1):
            if spec.num_layers % pipeline_parallel or gpus % (tensor_parallel * pipeline_parallel):
                continue
            expert_parallel = 1
            while expert_parallel <= num_experts:
                yield tensor_parallel, pipeline_parallel, expert_parallel
                expert_parallel *= 2
        tensor_parallel *= 2


def _longest_that_fits(memory: MemoryModel, layout: MegatronConfig, usable_bytes: int) -> int:
    """Return the longest sequence with which ``layout`` fits, in steps of 16 tokens; 0 if none.

    A micro-batch is then one sequence. The result is at least an eighth of what was planned: data
    are often shorter than their limit.
    """
    work = memory.work

    def fits(sixteens: int) -> bool:
        tokens = 16 * sixteens
        shorter = replace(memory, work=replace(work, longest=tokens))
        small_batches = replace(layout, tokens_per_micro_batch=tokens)
        return shorter.worst_rank(small_batches).peak <= usable_bytes

    low = work.longest // 8 // 16
    high = -(-work.longest // 16)
    if layout.tokens_per_micro_batch > work.longest or low < 1 or not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return 16 * low


def _alternatives(work: Training, layout: MegatronConfig) -> Iterator[tuple[str, MegatronConfig]]:
    """Yield settings that may save memory, as text and as layout, the cheapest first."""
    for recompute in RECOMPUTE[RECOMPUTE.index(layout.recompute_granularity) + 1 :]:
        yield (
            f"megatron.recompute_granularity={recompute}",
            replace(layout, recompute_granularity=recompute),
        )
    if layout.tensor_parallel > 1 and not layout.sequence_parallel:
        yield "megatron.sequence_parallel=true", replace(layout, sequence_parallel=True)
    if layout.data_parallel > 1 and not layout.distributed_optimizer:
        yield "megatron.distributed_optimizer=true", replace(layout, distributed_optimizer=True)
    if layout.dtype == "float32":
        yield "megatron.dtype=bfloat16", replace(layout, dtype="bfloat16")
    else:
        # Without data parallelism float32 needs less: the optimizer keeps no copies.
        other = "bfloat16" if layout.grad_reduce_dtype == "float32" else "float32"
        yield f"megatron.grad_reduce_dtype={other}", replace(layout, grad_reduce_dtype=other)
    if layout.tokens_per_micro_batch > work.longest:
        half = max(work.longest, layout.tokens_per_micro_batch // 2)
        yield (
            f"megatron.tokens_per_micro_batch={half}",
            replace(layout, tokens_per_micro_batch=half),
        )
    for name in ("tensor_parallel", "pipeline_parallel"):
        bigger = {name: 2 * getattr(layout, name)}
        if name == "tensor_parallel":
            bigger["sequence_parallel"] = True
        if layout.data_parallel % 2 == 0:
            yield (
                f"megatron.{name}={bigger[name]} with half the data_parallel",
                replace(layout, **bigger, data_parallel=layout.data_parallel // 2),
            )
        yield f"megatron.{name}={bigger[name]} on twice the GPUs", replace(layout, **bigger)
    if layout.distributed_optimizer:
        yield (
            f"megatron.data_parallel={2 * layout.data_parallel} on twice the GPUs",
            replace(layout, data_parallel=2 * layout.data_parallel),
        )
