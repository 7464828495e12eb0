"""Plan one stage on one cluster: GPUs per role, layouts that fit, step times, settings to use."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.weight_sync.sync_plan import plan_sync

from .cluster import GB, Cluster, Rates
from .engine_memory import EngineMemory, engine_memory, possible_engines
from .layouts import Candidate, MemoryModel, advice, candidates, evaluate
from .step_time import generation_seconds, sync_seconds
from .workload import Generation, Model, Workload, workload

_MAX_ADVICE = 4


@dataclass(frozen=True)
class EnginePlan:
    """Servers of one role."""

    work: Generation
    memory: EngineMemory
    engines: int
    seconds: float

    @property
    def gpus(self) -> int:
        """GPUs of all servers of the role."""
        return self.engines * self.memory.tensor_parallel


@dataclass(frozen=True)
class CapacityPlan:
    """Engines, trainer layouts and times of one stage on one cluster."""

    work: Workload
    cluster: Cluster
    rates: Rates
    engines: tuple[EnginePlan, ...]
    trainer_gpus: int
    layouts: tuple[Candidate, ...]
    """Layouts that fit, fastest first; with ``check`` the configured one."""
    too_large: int
    """Number of possible layouts that do not fit."""
    sync_seconds: float

    @property
    def step_seconds(self) -> dict[str, float]:
        """Seconds of every phase, with the fastest layout."""
        names = {"policy": "generate", "verifier": "verify"}
        phases = {names[engine.work.role]: engine.seconds for engine in self.engines}
        if self.layouts:
            phases |= self.layouts[0].seconds
        if self.sync_seconds:
            phases["weight sync"] = self.sync_seconds
        return phases

    @property
    def overrides(self) -> list[str]:
        """Settings of the fastest layout and of the engines, as command-line overrides."""
        overrides = []
        if self.layouts:
            layout = self.layouts[0].layout
            names = [
                "tensor_parallel",
                "pipeline_parallel",
                "data_parallel",
                "sequence_parallel",
                "recompute_granularity",
            ]
            if layout.expert_parallel > 1:
                names.append("expert_parallel")
            for name in names:
                overrides.append(f"megatron.{name}={str(getattr(layout, name)).lower()}")
        for engine in self.engines:
            size = engine.memory.tensor_parallel
            overrides.append(f"engine.{engine.work.role}.tensor_parallel={size}")
        return overrides


def plan_capacity(
    config: SparkConfig,
    stage: str,
    cluster: Cluster,
    rates: Rates,
    *,
    model: str | None = None,
    engine_gpus: dict[str, int] | None = None,
    check: bool = False,
) -> CapacityPlan:
    """Plan ``stage`` of ``config``.

    ``engine_gpus`` sets the GPUs of a role. ``check`` evaluates ``megatron.*`` alone instead of
    every layout. Raises ``ConfigError`` when nothing fits; it names the missing bytes or GPUs, and
    the settings that would help.
    """
    work = workload(config, stage, model)
    engines = tuple(_engines(config, work, cluster, rates, engine_gpus or {}))
    training = work.training
    if training is None:
        return CapacityPlan(work, cluster, rates, engines, 0, (), 0, 0.0)
    trainer_gpus = cluster.gpus - sum(engine.gpus for engine in engines)
    if trainer_gpus < 1:
        raise ConfigError(
            f"the engines of {stage} take {cluster.gpus - trainer_gpus} of {cluster.gpus} GPUs: "
            "none is left to train; use more --nodes, or lower --policy-gpus or --verifier-gpus"
        )
    sync_peak_bytes = 0
    seconds_of_sync = 0.0
    if training.syncs:
        total_bytes, sync_peak_bytes = _sync_bytes(training.model, config.weight_sync.bucket_bytes)
        seconds_of_sync = sync_seconds(total_bytes, _cluster_transport(config), rates)
    memory = MemoryModel(training, sync_peak_bytes)
    if check:
        missing = config.megatron.world_size - trainer_gpus
        if missing > 0:
            more = math.ceil(missing / cluster.gpus_per_node)
            raise ConfigError(
                f"megatron.* needs {config.megatron.world_size} GPUs and {trainer_gpus} of "
                f"{cluster.gpus} are the trainer's: use {more} more --nodes, or lower "
                "megatron.data_parallel"
            )
        found = [evaluate(memory, config.megatron, cluster, rates)]
    else:
        found = candidates(memory, config.megatron, trainer_gpus, cluster, rates)
    fitting = tuple(each for each in found if each.shortage(cluster) <= 0)
    if not fitting:
        raise ConfigError(_nothing_fits(memory, found, trainer_gpus, cluster))
    return CapacityPlan(
        work=work,
        cluster=cluster,
        rates=rates,
        engines=engines,
        trainer_gpus=trainer_gpus,
        layouts=fitting,
        too_large=len(found) - len(fitting),
        sync_seconds=seconds_of_sync,
    )


def _cluster_transport(config: SparkConfig) -> str:
    """Return the transport of weight sync on a cluster, where no engine is in the trainer."""
    transport = config.weight_sync.transport_for("sglang")
    return "disk" if transport == "in_process" else transport


def _engines(
    config: SparkConfig, work: Workload, cluster: Cluster, rates: Rates, engine_gpus: dict[str, int]
) -> list[EnginePlan]:
    """Plan the servers of every role: of the configured size, else of the fastest size."""
    plans = []
    for generation in work.generations:
        role = generation.role
        memories = _engine_sizes(config, generation, cluster, rates)
        smallest = memories[0].tensor_parallel
        gpus = engine_gpus.get(role) or _default_gpus(work, smallest, cluster)
        options = []
        for memory in memories:
            if gpus % memory.tensor_parallel == 0:
                count = gpus // memory.tensor_parallel
                seconds = generation_seconds(generation, memory, count, rates)
                options.append(EnginePlan(generation, memory, count, seconds))
        if not options:
            raise ConfigError(f"--{role}-gpus {gpus}: an engine takes {smallest}, use a multiple")
        plans.append(min(options, key=lambda plan: plan.seconds))
    return plans


def _engine_sizes(
    config: SparkConfig, generation: Generation, cluster: Cluster, rates: Rates
) -> list[EngineMemory]:
    """Return the engines that a role may use, smallest first."""
    role = generation.role
    size = config.engine.pool(role).tensor_parallel
    if size is None:
        return possible_engines(generation, config.engine.max_batch_size, cluster, rates)
    memory = engine_memory(generation, size, config.engine.max_batch_size, cluster, rates)
    if not memory.fits(generation.context):
        raise ConfigError(
            f"engine.{role}.tensor_parallel={size}: {memory.weights / GB:.1f} GB of weights "
            f"per GPU leave memory for {max(0, memory.kv_tokens):,} tokens, one text has up to "
            f"{generation.context:,}: raise it"
        )
    return [memory]


def _default_gpus(work: Workload, tensor_parallel: int, cluster: Cluster) -> int:
    """Return the GPUs of a role that is not configured; at least one engine.

    Engines share everything where nothing is trained. Otherwise a role gets a sixth of the nodes,
    or on fewer than three nodes a quarter of the GPUs.
    """
    if work.training is None:
        gpus = cluster.gpus // len(work.generations)
    elif cluster.nodes >= 3:
        gpus = max(1, cluster.nodes // 6) * cluster.gpus_per_node
    else:
        gpus = cluster.gpus // 4
    return max(1, gpus // tensor_parallel) * tensor_parallel


def _sync_bytes(model: Model, bucket_bytes: int) -> tuple[int, int]:
    """Return the bytes of the model in bfloat16, and a sync's peak on the main rank."""
    tensor_parallel = 2 if model.spec.num_heads % 2 == 0 else 1
    plan = plan_sync(
        model.spec,
        "bfloat16",
        tensor_parallel=tensor_parallel,
        engine_tensor_parallel=1,
        bucket_bytes=bucket_bytes,
    )
    return plan.total_bytes, plan.peak_bytes


def _nothing_fits(memory: MemoryModel, found: list[Candidate], gpus: int, cluster: Cluster) -> str:
    """Return the error for a cluster on which no layout fits."""
    name = memory.work.model.name
    spec = memory.work.model.spec
    if not found:
        return (
            f"{name} cannot be split over {gpus} GPUs: tensor parallel divides {spec.num_heads} "
            f"heads, pipeline parallel {spec.num_layers} layers; choose another number of nodes"
        )
    best = min(found, key=lambda each: each.shortage(cluster))
    layout = best.layout
    states = best.worst.states
    helps = advice(memory, layout, cluster.usable_bytes)[:_MAX_ADVICE] or ["use more GPUs"]
    return (
        f"{name} does not fit {gpus} GPUs of {cluster.gpu_memory_gb:g} GB: "
        f"TP {layout.tensor_parallel} x PP {layout.pipeline_parallel} x DP {layout.data_parallel}, "
        f"recompute {layout.recompute_granularity}, needs {best.worst.peak / GB:.1f} GB (weights "
        f"{states.weights / GB:.1f}, gradients {states.gradients / GB:.1f}, optimizer "
        f"{states.optimizer / GB:.1f}, the rest {(best.worst.peak - states.total) / GB:.1f}) of "
        f"{cluster.usable_bytes / GB:.1f} usable, {best.shortage(cluster) / GB:.1f} GB too much; "
        + "; ".join(helps)
    )
