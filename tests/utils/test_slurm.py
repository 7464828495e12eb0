from __future__ import annotations

import pytest

from spark_nemo.utils.slurm import first_host, slurm_task

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NODELIST": "node[02-03]",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1"),
        ("gpu[007-010,012],login1", "gpu007"),
        ("a[3,5]", "a3"),
        ("r[1-2]n[04-09]", "r1n04"),
        ("x-1,y[1-2]", "x-1"),
        ("n[1-2]-ib,m3", "n1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    """Slurm's short form of host names, without scontrol, which a container does not have."""
    assert first_host(nodes) == first


def test_every_task_of_a_step_names_the_same_meeting_point() -> None:
    """Rank and size are the step's; tasks agree on address and port, other steps and jobs get
    another port.
    """
    tasks = [slurm_task({**STEP, "SLURM_PROCID": str(i)}) for i in range(4)]
    assert [task.rank for task in tasks] == [0, 1, 2, 3]
    assert {(task.world_size, task.master_address, task.master_port) for task in tasks} == {
        (4, "node02", tasks[0].master_port)
    }
    other_step, other_job = (
        slurm_task({**STEP, "SLURM_STEP_ID": "4"}),
        slurm_task({**STEP, "SLURM_JOB_ID": "1234568"}),
    )
    assert len({tasks[0].master_port, other_step.master_port, other_job.master_port}) == 3
    assert all(10000 <= task.master_port < 30000 for task in (tasks[0], other_step, other_job))


def test_a_batch_script_is_no_task() -> None:
    """A batch script has SLURM_PROCID=0 and perhaps SLURM_NTASKS: ranks must be launched there, not
    waited for.
    """
    assert slurm_task({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None
    assert slurm_task({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None
