"""Check before a model is loaded that the configured layout fits the devices of this machine."""

from __future__ import annotations

import os
import re

import psutil
import torch

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.megatron.layer_spec import uses_transformer_engine
from spark_nemo.planning.cluster import GB, Cluster
from spark_nemo.planning.layouts import MemoryModel, advice
from spark_nemo.planning.workload import training

_MAX_ADVICE = 4


def check_memory(config: SparkConfig, *stages: str) -> None:
    """Raise ``ConfigError`` if the worst rank of one of ``stages`` needs more than its share.

    The share is one of this machine's GPUs or, without CUDA, the host's memory divided by the ranks
    on this machine. The message names the shortage and the settings that would help. Memory that
    engines take on the same device is not counted: what passes here may still not fit.
    """
    machine, description = this_machine(config.megatron.world_size)
    for stage in stages:
        work = training(config, stage)
        memory = MemoryModel(work, transformer_engine=uses_transformer_engine())
        worst = memory.worst_rank(config.megatron)
        shortage = worst.peak - machine.usable_bytes
        if shortage <= 0:
            continue
        states = worst.states
        helps = advice(memory, config.megatron, machine.usable_bytes)
        raise ConfigError(
            f"megatron.*: {work.model.name} in {stage} needs {worst.peak / GB:.1f} GB on a rank of "
            f"pipeline stage {worst.stage} (weights {states.weights / GB:.1f}, gradients "
            f"{states.gradients / GB:.1f}, optimizer {states.optimizer / GB:.1f}, the rest "
            f"{(worst.peak - states.total) / GB:.1f}), and {description}: "
            f"{shortage / GB:.1f} GB too much; {'; '.join(helps[:_MAX_ADVICE])}"
        )


def this_machine(world_size: int) -> tuple[Cluster, str]:
    """Return this machine as a cluster of one node with a device per rank, and its description."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gigabytes = properties.total_memory / GB
        return (
            Cluster(1, torch.cuda.device_count(), gigabytes),
            f"this {properties.name} has {gigabytes:.1f} GB, of which a tenth is CUDA's",
        )
    ranks = local_ranks(world_size)
    total = psutil.virtual_memory().total / GB
    # Nothing is reserved on the host: the operating system swaps before an allocation fails.
    return (
        Cluster(1, ranks, total / ranks, reserve=0.0),
        f"this machine has {total:.1f} GB for {ranks} rank(s), {total / ranks:.1f} GB each",
    )


def local_ranks(world_size: int) -> int:
    """Return the ranks on this machine: from torchrun or Slurm, else all of them."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return max(1, int(os.environ["LOCAL_WORLD_SIZE"]))
    # "4(x2),3" is 4 tasks on two nodes and 3 on a third: the first nodes have the most.
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if tasks and int(tasks[0]) > 0:
        return min(world_size, int(tasks[0]))
    return world_size
