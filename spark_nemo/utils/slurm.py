"""The place of this process in a Slurm step, read from the environment of the step's tasks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

# Below the ports that Linux gives to outgoing connections (32768 and up).
_FIRST_PORT = 10000
_NUM_PORTS = 20000


@dataclass(frozen=True)
class SlurmTask:
    """One task of a step; the tasks meet at ``master_address:master_port`` by default."""

    rank: int
    world_size: int
    master_address: str
    master_port: int


def slurm_task(environment: Mapping[str, str] | None = None) -> SlurmTask | None:
    """Return this process's task, or None outside a step and in a step of one task.

    The tasks meet on the step's first node, where Slurm puts task 0, at a port derived from the
    ids of job and step. ``environment`` replaces ``os.environ``.
    """
    if environment is None:
        environment = os.environ
    # Not SLURM_NTASKS: the batch script and every shell in an allocation have it as well.
    world_size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world_size == 1:
        return None
    step_number = int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"])
    return SlurmTask(
        rank=int(environment["SLURM_PROCID"]),
        world_size=world_size,
        master_address=first_host(environment["SLURM_STEP_NODELIST"]),
        master_port=_FIRST_PORT + step_number % _NUM_PORTS,
    )


def first_host(node_list: str) -> str:
    """Return the first name of a Slurm node list: ``gpu007`` of ``gpu[007-010,012],login1``."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", node_list)
    assert first is not None, "the pattern matches the empty string"
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
