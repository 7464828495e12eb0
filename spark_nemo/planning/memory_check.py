"""Does the configured layout fit the devices of this machine? Asked before a model is loaded."""

from __future__ import annotations

import os
import re

import psutil
import torch

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.megatron.layer_spec import uses_transformer_engine
from spark_nemo.planning.cluster import GB, Cluster, Rates
from spark_nemo.planning.layouts import Candidate, advice, evaluate
from spark_nemo.planning.workload import Training, training


def check_memory(config: SparkConfig, *stages: str) -> None:
    """Raise ``ConfigError`` when the worst rank of one of ``stages`` (stage2, stage3, sft) needs
    more than one of this machine's GPUs has, or, without CUDA, more than its share of the host's
    memory.

    The message says by how much, and which setting would help. The share is that of the ranks on
    this machine; what engines in the same memory take is not counted, so what passes here may still
    not fit beside them.
    """
    cluster, what = this_machine(config.megatron.world_size)
    for stage in stages:
        work = training(config, stage)
        found = evaluate(
            work, config.megatron, cluster, Rates(), transformer_engine=uses_transformer_engine()
        )
        if found.shortage(cluster) > 0:
            raise ConfigError(_refusal(stage, work, found, cluster, what))


def this_machine(world_size: int) -> tuple[Cluster, str]:
    """This machine as a cluster of one node with a GPU per rank, and what the budget is in words.

    On the host nothing is reserved: its whole memory is shared out, and the operating system swaps
    before it fails.
    """
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return (
            Cluster(1, torch.cuda.device_count(), properties.total_memory / GB),
            f"this {properties.name} has {properties.total_memory / GB:.1f} GB, of which a tenth is CUDA's",
        )
    ranks, total = local_ranks(world_size), psutil.virtual_memory().total
    return (
        Cluster(1, ranks, total / ranks / GB, reserve=0.0),
        f"this machine has {total / GB:.1f} GB for {ranks} rank(s), {total / ranks / GB:.1f} GB each",
    )


def local_ranks(world_size: int) -> int:
    """Ranks on this machine: torchrun or Slurm says so, else all of them are here."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return max(1, int(os.environ["LOCAL_WORLD_SIZE"]))
    # "4(x2),3" is 4 tasks on two nodes and 3 on a third: the first nodes have the most.
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return min(world_size, int(tasks[0])) if tasks and int(tasks[0]) else world_size


def _refusal(stage: str, work: Training, found: Candidate, cluster: Cluster, what: str) -> str:
    worst, states = found.worst, found.worst.states
    helps = advice(work, found, cluster, Rates(), transformer_engine=uses_transformer_engine())
    return (
        f"megatron.*: {work.model.name} in {stage} needs {worst.peak / GB:.1f} GB on a rank of pipeline stage "
        f"{worst.stage} (weights {states.weights / GB:.1f}, gradients {states.gradients / GB:.1f}, optimizer "
        f"{states.optimizer / GB:.1f}, the rest {(worst.peak - states.total) / GB:.1f}), and {what}: "
        f"{found.shortage(cluster) / GB:.1f} GB too much; " + "; ".join(helps[:4])
    )
