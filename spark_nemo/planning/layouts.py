"""Which layouts of a trainer fit, how far the others are from it, and what would help."""

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
        """Of the trainer's phases."""
        return sum(self.seconds.values())

    def shortage(self, cluster: Cluster) -> int:
        """Bytes that the worst rank lacks; negative are left over."""
        return self.worst.peak - cluster.usable_bytes


def evaluate(
    work: Training,
    layout: MegatronConfig,
    cluster: Cluster,
    rates: Rates,
    sync_bytes: int = 0,
    transformer_engine: bool = True,
) -> Candidate:
    """Raises ``ConfigError`` when the model cannot be split so."""
    stages = rank_memory(
        work.model.spec,
        layout,
        work.batch(layout.data_parallel, layout.tokens_per_micro_batch),
        transformer_engine=transformer_engine,
        sync_bytes=sync_bytes,
        snapshots=work.snapshots,
    )
    worst = worst_rank(stages)
    return Candidate(layout, worst, training_seconds(work, layout, worst, cluster, rates))


def candidates(
    work: Training,
    base: MegatronConfig,
    gpus: int,
    cluster: Cluster,
    rates: Rates,
    sync_bytes: int = 0,
) -> list[Candidate]:
    """Every layout of all ``gpus`` that the model can be split into, fastest first; fits or not.

    Tensor parallel stays in a node and is a power of two; dtype, optimizer and micro-batches are
    ``base``'s.
    """
    found = []
    for tp, pp, ep in _sizes(work, gpus, cluster):
        for recompute in RECOMPUTE:
            layout = replace(
                base,
                tensor_parallel=tp,
                pipeline_parallel=pp,
                data_parallel=gpus // (tp * pp),
                expert_parallel=ep,
                sequence_parallel=tp > 1,
                recompute_granularity=recompute,
            )
            try:
                found.append(evaluate(work, layout, cluster, rates, sync_bytes))
            except ConfigError:
                continue  # the model cannot be split so
    return sorted(
        found,
        key=lambda each: (each.step_seconds, RECOMPUTE.index(each.layout.recompute_granularity)),
    )


def _sizes(work: Training, gpus: int, cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    tp = 1
    while tp <= cluster.gpus_per_node:
        for pp in range(1, min(_MAX_PIPELINE, work.model.spec.num_layers) + 1):
            if work.model.spec.num_layers % pp or gpus % (tp * pp):
                continue
            experts = work.model.spec.experts
            ep = 1
            while ep <= (experts.count if experts else 1):
                yield tp, pp, ep
                ep *= 2
        tp *= 2


def advice(
    work: Training,
    candidate: Candidate,
    cluster: Cluster,
    rates: Rates,
    sync_bytes: int = 0,
    transformer_engine: bool = True,
) -> list[str]:
    """One line per setting that needs fewer bytes than ``candidate``: what makes it fit first, then
    what needs no more GPUs.
    """
    layout, lines = candidate.layout, []
    for order, (text, other) in enumerate(_knobs(work, layout)):
        try:
            changed = evaluate(
                work, other, cluster, rates, sync_bytes, transformer_engine=transformer_engine
            )
        except ConfigError:
            continue
        saved = candidate.worst.peak - changed.worst.peak
        if saved > 0:
            verdict = (
                "fits"
                if changed.shortage(cluster) <= 0
                else f"lacks {changed.shortage(cluster) / GB:.1f} GB"
            )
            line = f"{text} saves {saved / GB:.1f} GB: {verdict}"
            lines.append(
                (changed.shortage(cluster) > 0, other.world_size > layout.world_size, order, line)
            )
    if longest := _longest_that_fits(work, layout, cluster, rates, sync_bytes, transformer_engine):
        line = (
            f"sequences and micro-batches of {longest:,} tokens instead of {work.longest:,}: fits"
        )
        lines.append((False, False, 1, line))  # after recomputation
    return [line for *_, line in sorted(lines)]


def _longest_that_fits(
    work: Training,
    layout: MegatronConfig,
    cluster: Cluster,
    rates: Rates,
    sync_bytes: int,
    transformer_engine: bool,
) -> int:
    """Tokens of the longest sequence with which ``layout`` fits, in steps of 16, where a
    micro-batch is one sequence, at least an eighth of what was planned; else 0. Data are often
    shorter than their limit.
    """

    def fits(tokens: int) -> bool:
        shorter = replace(layout, tokens_per_micro_batch=tokens)
        return (
            evaluate(
                replace(work, longest=tokens),
                shorter,
                cluster,
                rates,
                sync_bytes,
                transformer_engine=transformer_engine,
            ).shortage(cluster)
            <= 0
        )

    low, high = work.longest // 8 // 16, -(-work.longest // 16)
    if layout.tokens_per_micro_batch > work.longest or low < 1 or not fits(16 * low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(16 * middle) else (low, middle)
    return 16 * low


def _knobs(work: Training, layout: MegatronConfig) -> Iterator[tuple[str, MegatronConfig]]:
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
    else:  # without data parallelism float32 takes less: the optimizer needs no copies
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
