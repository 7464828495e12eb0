"""Show a capacity plan as a table or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .capacity_planner import CapacityPlan, EnginePlan
from .cluster import GB
from .layouts import Candidate
from .workload import PROBLEMS

_SHOWN = 8


def plan_text(plan: CapacityPlan) -> str:
    """Return the table: engines, memory of the worst rank, step times, settings to paste.

    GB are 10^9 bytes.
    """
    cluster = plan.cluster
    lines = [
        f"{plan.work.stage} on {cluster.nodes} x {cluster.gpus_per_node} GPUs of "
        f"{cluster.gpu_memory_gb:g} GB, "
        f"{cluster.usable_bytes / GB:.1f} GB of each planned with (--reserve {cluster.reserve:g})"
    ]
    lines += [_engine_line(engine) for engine in plan.engines]
    if plan.work.training is not None:
        lines += ["", *_trainer_lines(plan)]
    unit = f"{PROBLEMS:,} problems" if plan.work.training is None else "a step"
    phases = "  ".join(f"{name} {seconds:,.1f}" for name, seconds in plan.step_seconds.items())
    total = sum(plan.step_seconds.values())
    assumed = ", ".join(
        f"{name.replace('_', '-')} {value:g}" for name, value in vars(plan.rates).items()
    )
    lines += [
        "",
        f"seconds of {unit}, estimated: {phases}  together {total:,.1f}",
        f"assumed: {assumed}",
        "",
        "recommended: " + " ".join(plan.overrides),
    ]
    return "\n".join(lines)


def _engine_line(engine: EnginePlan) -> str:
    memory = engine.memory
    return (
        f"{engine.work.role}: {engine.work.model.name}, {engine.engines} engine(s) of "
        f"{memory.tensor_parallel} GPU(s); each GPU {memory.weights / GB:.1f} GB weights, "
        f"KV cache {memory.kv_token / 1024:.0f} KiB per token, "
        f"room for {memory.kv_tokens:,} tokens, {memory.running} texts at once"
    )


def _trainer_lines(plan: CapacityPlan) -> list[str]:
    training = plan.work.training
    assert training is not None
    lines = [
        f"trainer: {training.model.name} on {plan.trainer_gpus} GPUs; "
        f"{training.sequences:,} sequences of at most {training.longest:,} tokens a step. "
        "GB of the worst rank:",
        "  TP  PP   DP  EP recompute  weights  grads  optim  activ  logits+tmp  sync   peak   free"
        "    s/step",
    ]
    lines += [_layout_line(each, plan) for each in plan.layouts[:_SHOWN]]
    more = len(plan.layouts) - _SHOWN
    if more > 0:
        lines.append(f"  and {more} more that fit (--json lists all)")
    if plan.too_large:
        lines.append(
            f"  {plan.too_large} other layouts do not fit (every recompute setting counted)"
        )
    if training.snapshots:
        per_node = plan.layouts[0].worst.snapshot * plan.cluster.gpus_per_node / GB
        lines.append(
            "host memory for the reference weights and the current ones aside: "
            f"{per_node:.0f} GB per node"
        )
    return lines


def _layout_line(each: Candidate, plan: CapacityPlan) -> str:
    layout = each.layout
    rank = each.worst
    return (
        f"{layout.tensor_parallel:4d}{layout.pipeline_parallel:4d}{layout.data_parallel:5d}"
        f"{layout.expert_parallel:4d} {layout.recompute_granularity:9s}"
        f"{rank.states.weights / GB:9.1f}"
        f"{rank.states.gradients / GB:7.1f}{rank.states.optimizer / GB:7.1f}{rank.graphs / GB:7.1f}"
        f"{rank.transient / GB:12.1f}{rank.sync / GB:6.1f}{rank.peak / GB:7.1f}"
        f"{-each.shortage(plan.cluster) / GB:7.1f}{each.step_seconds:10.1f}"
    )


def plan_json(plan: CapacityPlan) -> dict[str, Any]:
    """Return the plan in bytes and seconds, with every layout that fits, fastest first."""
    return {
        "stage": plan.work.stage,
        "cluster": asdict(plan.cluster),
        "rates": asdict(plan.rates),
        "engines": [
            {
                "role": engine.work.role,
                "model": engine.work.model.name,
                "engines": engine.engines,
                "gpus": engine.gpus,
                **asdict(engine.memory),
            }
            for engine in plan.engines
        ],
        "trainer_gpus": plan.trainer_gpus,
        "layouts": [_layout_json(each, plan) for each in plan.layouts],
        "too_large": plan.too_large,
        "step_seconds": plan.step_seconds,
        "overrides": plan.overrides,
    }


def _layout_json(each: Candidate, plan: CapacityPlan) -> dict[str, Any]:
    rank = each.worst
    return {
        "layout": asdict(each.layout),
        "stage": rank.stage,
        "parameters": rank.num_parameters,
        "bytes": {
            **asdict(rank.states),
            "activations": rank.graphs,
            "passing": rank.transient,
            "sync": rank.sync,
            "peak": rank.peak,
            "free": -each.shortage(plan.cluster),
            "host_snapshots": rank.snapshot,
        },
        "seconds": each.seconds,
    }
