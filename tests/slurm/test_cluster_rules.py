"""Rules of Slurm that ``slurm/lib.sh`` rests on, each by its own function in a job that does
nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster import Cluster
from slurm_world import REPO, output, site

LIB = f'SLURM_DIR={REPO}/slurm\nsource "$SLURM_DIR/lib.sh"\nload_site\n'


def submit(slurm: Cluster, folder: Path, body: str, *options: str) -> int:
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{LIB}LOG_DIR={folder}\n{body}\n")
    return slurm.sbatch(
        "--time=5", "--open-mode=append", *options, script, env=site(folder), cwd=folder
    )


def test_a_requeued_task_leaves_the_rest_of_its_array_alone(slurm: Cluster, tmp_path: Path) -> None:
    """The task whose job id is the array's own requeues itself and the others run on; ``scontrol
    requeue`` of that id began all of them again.
    """
    job = submit(
        slurm,
        tmp_path,
        """echo "restart $RESTART"
        if [[ $JOB == "$SLURM_ARRAY_JOB_ID" && $RESTART == 0 ]]; then
            sleep 2
            requeue "time limit"
        fi
        sleep 5""",
        "--array=0-2",
        f"--output={tmp_path}/out-%a.txt",
        "--ntasks=1",
        "--requeue",
    )
    slurm.until(lambda: set(slurm.array_states(job)) == {"COMPLETED"}, "end of the array", 60)
    said = {
        number: re.findall(
            r"^restart (\d)", (tmp_path / f"out-{number}.txt").read_text(), re.MULTILINE
        )
        for number in range(3)
    }
    assert sorted(said.values()) == [["0"], ["0"], ["0", "1"]], said


def test_a_job_without_cpus_for_its_ranks_says_so(slurm: Cluster, tmp_path: Path) -> None:
    """Without a CPU option Slurm gives one CPU per node; the error names the option to add."""
    job = submit(
        slurm,
        tmp_path,
        "NODES=(a b) GPUS_PER_NODE=2; preflight",
        "--nodes=2",
        "--gpus-per-node=2",
        "--output=out-%A.txt",
    )
    assert slurm.wait_state(job)["JobState"] == "FAILED"
    assert "this job has 1 CPUs" in output(tmp_path, job).splitlines()[-1]
