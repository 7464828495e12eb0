"""Which task of which ``srun`` this process is, from the environment that Slurm gives a step's
tasks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_PORT, _NUM_PORTS = 10000, 20000
"""Below the ports that Linux hands to outgoing connections (32768 and up)."""


@dataclass(frozen=True)
class SlurmTask:
    """One task of a step. Where nothing else is said, the tasks meet at
    ``master_address:master_port``.
    """

    rank: int
    world_size: int
    master_address: str
    master_port: int


def slurm_task(environment: Mapping[str, str] | None = None) -> SlurmTask | None:
    """This process as a task of a step with several tasks; None outside, in a batch script and in a
    step of one task.

    The tasks meet on the step's first node, where Slurm puts task 0, at a port made from the job's
    and step's ids.
    """
    env = os.environ if environment is None else environment
    # Not SLURM_NTASKS: the batch script and every shell in an allocation have it as well.
    world_size = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if world_size == 1:
        return None
    port = _FIRST_PORT + (int(env["SLURM_JOB_ID"]) * 16 + int(env["SLURM_STEP_ID"])) % _NUM_PORTS
    return SlurmTask(
        int(env["SLURM_PROCID"]), world_size, first_host(env["SLURM_STEP_NODELIST"]), port
    )


def first_host(node_list: str) -> str:
    """The first name of a node list as Slurm writes it: ``gpu[007-010,012],login1`` is ``gpu007``."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", node_list)
    assert first is not None, "the pattern matches the empty string"
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
