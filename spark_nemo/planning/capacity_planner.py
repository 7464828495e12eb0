"""The plan of one stage on one cluster: who gets which GPUs, what fits, what a step takes, what to
write into the configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.weight_sync.sync_plan import plan_sync

from .cluster import GB, Cluster, Rates
from .engine_memory import EngineMemory, engine_memory, possible_engines
from .layouts import Candidate, advice, candidates, evaluate
from .step_time import generation_seconds, sync_seconds
from .workload import Generation, Model, Training, Workload, workload


@dataclass(frozen=True)
class EnginePlan:
    """The servers of one role."""

    work: Generation
    memory: EngineMemory
    engines: int
    seconds: float

    @property
    def gpus(self) -> int:
        """Of all servers of the role."""
        return self.engines * self.memory.tensor_parallel


@dataclass(frozen=True)
class Plan:
    """What ``make_plan`` found."""

    work: Workload
    cluster: Cluster
    rates: Rates
    engines: tuple[EnginePlan, ...]
    trainer_gpus: int
    layouts: tuple[Candidate, ...]
    """Those that fit, fastest first; with ``check`` the configured one."""
    refused: int
    """Layouts that the model can be split into and that do not fit."""
    sync_seconds: float

    @property
    def step_seconds(self) -> dict[str, float]:
        """Seconds of every phase, with the fastest layout."""
        phases = {
            f"{'generate' if engine.work.role == 'policy' else 'verify'}": engine.seconds
            for engine in self.engines
        }
        if self.layouts:
            phases |= self.layouts[0].seconds
        return {**phases, "weight sync": self.sync_seconds} if self.sync_seconds else phases

    @property
    def overrides(self) -> list[str]:
        """The settings of the fastest layout and of the engines, as ``conf/`` and the command line
        write them.
        """
        words = []
        if self.layouts:
            layout = self.layouts[0].layout
            names = [
                "tensor_parallel",
                "pipeline_parallel",
                "data_parallel",
                "sequence_parallel",
                "recompute_granularity",
            ]
            names += ["expert_parallel"] if layout.expert_parallel > 1 else []
            words = [f"megatron.{name}={str(getattr(layout, name)).lower()}" for name in names]
        return words + [
            f"engine.{engine.work.role}.tensor_parallel={engine.memory.tensor_parallel}"
            for engine in self.engines
        ]


def make_plan(
    config: SparkConfig,
    stage: str,
    cluster: Cluster,
    rates: Rates,
    *,
    model: str | None = None,
    engine_gpus: dict[str, int] | None = None,
    check: bool = False,
) -> Plan:
    """Plan ``stage`` of ``config``. ``engine_gpus`` says how many GPUs a role gets; ``check`` looks
    at ``megatron.*`` alone instead of every layout.

    Raises ``ConfigError`` when nothing fits: by how many bytes or GPUs, and which setting would
    help.
    """
    work = workload(config, stage, model)
    engines = tuple(_engines(config, work, cluster, rates, engine_gpus or {}))
    left = cluster.gpus - sum(engine.gpus for engine in engines)
    training = work.training
    if training is None:
        return Plan(work, cluster, rates, engines, 0, (), 0, 0.0)
    if left < 1:
        raise ConfigError(
            f"the engines of {stage} take {cluster.gpus - left} of {cluster.gpus} GPUs: none is left to "
            "train; use more --nodes, or lower --policy-gpus or --verifier-gpus"
        )
    transport, sync_bytes, synced = "disk", 0, 0.0
    if training.syncs:
        transport = config.weight_sync.transport_for("sglang")
        transport = "disk" if transport == "in_process" else transport
        total, sync_bytes = _sync_bytes(training.model, config.weight_sync.bucket_bytes)
        synced = sync_seconds(total, transport, rates)
    if check:
        if config.megatron.world_size > left:
            more = math.ceil((config.megatron.world_size - left) / cluster.gpus_per_node)
            raise ConfigError(
                f"megatron.* needs {config.megatron.world_size} GPUs and {left} of {cluster.gpus} are "
                f"the trainer's: use {more} more --nodes, or lower megatron.data_parallel"
            )
        found = [evaluate(training, config.megatron, cluster, rates, sync_bytes)]
    else:
        found = candidates(training, config.megatron, left, cluster, rates, sync_bytes)
    fitting = tuple(each for each in found if each.shortage(cluster) <= 0)
    if not fitting:
        raise ConfigError(_refusal(training, found, left, cluster, rates, sync_bytes))
    refused = sum(each.shortage(cluster) > 0 for each in found)
    return Plan(work, cluster, rates, engines, left, fitting, refused, synced)


def _engines(
    config: SparkConfig, work: Workload, cluster: Cluster, rates: Rates, engine_gpus: dict[str, int]
) -> list[EnginePlan]:
    """The servers of every role: of the configured size, else of the size that is fastest on the
    role's GPUs.
    """
    plans = []
    for generation in work.generations:
        role, size = generation.role, config.engine.pool(generation.role).tensor_parallel
        if size is None:
            memories = possible_engines(generation, config.engine.max_batch_size, cluster, rates)
        else:
            memories = [
                engine_memory(generation, size, config.engine.max_batch_size, cluster, rates)
            ]
            if not memories[0].fits(generation.context):
                raise ConfigError(
                    f"engine.{role}.tensor_parallel={size}: {memories[0].weights / GB:.1f} GB of weights per GPU leave "
                    f"room for {max(0, memories[0].kv_tokens):,} tokens, one text has up to {generation.context:,}: "
                    "raise it"
                )
        gpus = engine_gpus.get(role) or _share(work, memories[0].tensor_parallel, cluster)
        counts = [
            (memory, gpus // memory.tensor_parallel)
            for memory in memories
            if gpus % memory.tensor_parallel == 0
        ]
        if not counts:
            raise ConfigError(
                f"--{role}-gpus {gpus}: an engine takes {memories[0].tensor_parallel}, use a multiple"
            )
        plans.append(
            min(
                (
                    EnginePlan(
                        generation,
                        memory,
                        count,
                        generation_seconds(generation, memory, count, rates),
                    )
                    for memory, count in counts
                ),
                key=lambda plan: plan.seconds,
            )
        )
    return plans


def _share(work: Workload, tensor_parallel: int, cluster: Cluster) -> int:
    """GPUs of one role when nobody says: everything is the engines' where nothing is trained; else
    a sixth of the nodes, or of a small cluster a quarter of the GPUs. At least one engine.
    """
    if work.training is None:
        gpus = cluster.gpus // len(work.generations)
    elif cluster.nodes >= 3:
        gpus = max(1, cluster.nodes // 6) * cluster.gpus_per_node
    else:
        gpus = cluster.gpus // 4
    return max(1, gpus // tensor_parallel) * tensor_parallel


def _sync_bytes(model: Model, bucket_bytes: int) -> tuple[int, int]:
    """The whole model in bfloat16, and the most that a sync holds on the main rank."""
    tp = 2 if model.spec.num_heads % 2 == 0 else 1
    plan = plan_sync(
        model.spec,
        "bfloat16",
        tensor_parallel=tp,
        engine_tensor_parallel=1,
        bucket_bytes=bucket_bytes,
    )
    return plan.total_bytes, plan.peak_bytes


def _refusal(
    training: Training,
    found: list[Candidate],
    gpus: int,
    cluster: Cluster,
    rates: Rates,
    sync_bytes: int,
) -> str:
    name, spec = training.model.name, training.model.spec
    if not found:
        return (
            f"{name} cannot be split over {gpus} GPUs: tensor parallel divides {spec.num_heads} heads, pipeline "
            f"parallel {spec.num_layers} layers; choose another number of nodes"
        )
    best = min(found, key=lambda each: each.shortage(cluster))
    layout, states = best.layout, best.worst.states
    helps = advice(training, best, cluster, rates, sync_bytes)
    return (
        f"{name} does not fit {gpus} GPUs of {cluster.gpu_memory_gb:g} GB: TP {layout.tensor_parallel} x PP "
        f"{layout.pipeline_parallel} x DP {layout.data_parallel}, recompute {layout.recompute_granularity}, needs "
        f"{best.worst.peak / GB:.1f} GB (weights {states.weights / GB:.1f}, gradients {states.gradients / GB:.1f}, "
        f"optimizer {states.optimizer / GB:.1f}, the rest {(best.worst.peak - states.total) / GB:.1f}) of "
        f"{cluster.usable_bytes / GB:.1f} usable, {best.shortage(cluster) / GB:.1f} GB too much; "
        + ("; ".join(helps[:4]) if helps else "use more GPUs")
    )
