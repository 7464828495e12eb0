"""Time limits, crashes and cancellations of real training jobs, each against the run that nothing
happened to.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_world import (
    REPO,
    RL,
    SMALL,
    environment_of_this_process,
    logged,
    output,
    rows,
    site,
    submit,
)

from spark_nemo.records.store import RecordStore

STEPS = [*RL, "rl.steps=12", "rl.save_every=2"]
STAGE_RUN = "stage3/process_aware"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Metrics of the run on this machine, two ranks, without Slurm and without trouble."""
    run = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        [sys.executable, "-m", "spark_nemo.cli.main", "stage3", *STEPS, f"run.dir={run}"],
        env=environment_of_this_process(),
        text=True,
        capture_output=True,
        check=False,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr
    return rows(run / STAGE_RUN / "metrics.jsonl")


def train(slurm: Cluster, folder: Path, run: Path, *options: object, **settings: object) -> int:
    return submit(
        slurm,
        folder,
        "stage3_rl.sh",
        overrides=[*STEPS, f"run.dir={run}"],
        options=("--nodes=2", *options),
        **settings,
    )


def has_steps(run: Path, count: int) -> bool:
    return len(rows(run / STAGE_RUN / "metrics.jsonl")) >= count


def test_limit_signal_becomes_checkpoint_and_requeue_beside_another_job(
    slurm: Cluster, tmp_path: Path, undisturbed: list[dict]
) -> None:
    """Two jobs share both nodes, so that ports or files could collide. One gets the signal that
    Slurm sends before the limit: it checkpoints, is requeued, and every loss of both is that of the
    undisturbed run. The signal is sent with scancel, the same path as --signal=B:USR1, for Slurm's
    shortest limit is a minute.
    """
    together = ("--nodelist=node[0-1]", "--cpus-per-task=2", "--oversubscribe")
    quiet, limited = tmp_path / "quiet", tmp_path / "limited"
    jobs = [
        slurm.sbatch(
            "--time=10",
            "--nodes=2",
            *together,
            "--output=out-%j.txt",
            REPO / "slurm/stage3_rl.sh",
            "--",
            *STEPS,
            f"run.dir={run}",
            env=site(tmp_path),
            cwd=tmp_path,
        )
        for run in (quiet, limited)
    ]
    slurm.until(lambda: has_steps(limited, 1), "step")
    slurm.run("scancel", "--batch", "--signal=USR1", jobs[1])
    slurm.wait_state(jobs[1], {"PENDING"})
    assert 1 <= len(rows(limited / STAGE_RUN / "metrics.jsonl")) < 12, (
        "the signal came too late to test anything"
    )
    ended = [slurm.wait_state(job) for job in jobs]
    assert [(job["JobState"], job["Restarts"]) for job in ended] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
    ], output(tmp_path, jobs[1])
    assert {job["NodeList"] for job in ended[:1]} == {"node[0-1]"}
    for run in (quiet, limited):
        assert rows(run / STAGE_RUN / "metrics.jsonl") == undisturbed
    logs = limited / "logs" / STAGE_RUN
    assert "STATE=requeued\nREASON=time limit" in (logs / f"{jobs[1]}.0/state").read_text()
    assert (logs / f"{jobs[1]}.0/trainer-1.log").exists() and (
        logs / "latest"
    ).resolve().name == f"{jobs[1]}.1"
    assert not (limited / STAGE_RUN / "STOP").exists()


@pytest.mark.parametrize("which", ["batch host", "other node"])
def test_node_crash_in_stage_3(
    slurm: Cluster, tmp_path: Path, undisturbed: list[dict], which: str
) -> None:
    """A trainer node loses power: the job goes on from its checkpoint, on other nodes, with the
    same losses.
    """
    run = tmp_path / "run"
    job = train(slurm, tmp_path, run)
    slurm.until(lambda: (run / STAGE_RUN / "checkpoints/latest").exists(), "checkpoint")
    names = slurm.run("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).stdout.split()
    slurm.crash_node(names[0 if which == "batch host" else 1])
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", f"restart\n{output(tmp_path, job)}")
    ended = slurm.wait_state(job)
    assert ended["JobState"] == "COMPLETED", output(tmp_path, job)
    assert rows(run / STAGE_RUN / "metrics.jsonl") == undisturbed


def test_node_crash_and_limit_signal_in_stage_1(slurm: Cluster, tmp_path: Path) -> None:
    """The node of one shard loses power, another shard gets the limit signal: both are requeued and
    go on, and the store holds every solution exactly once.
    """
    run, problems = tmp_path / "run", 240
    overrides = [*SMALL, f"data.stage1_problems=toy:stage1:{problems}", f"run.dir={run}"]
    job = submit(
        slurm, tmp_path, "stage1_generate.sh", overrides=overrides, options=("--array=0-1",)
    )
    progress = run / "stage1/shard-0-of-2/progress.json"
    slurm.until(progress.exists, "verifications")
    node = (
        (run / "logs/stage1/shard-0-of-2/latest/state")
        .read_text()
        .split("NODES=")[1]
        .split("\n")[0]
    )
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    slurm.crash_node(node)
    slurm.until(
        lambda: slurm.array_states(job) == ["COMPLETED"] * 2,
        f"two shards {output(tmp_path, job)}",
        180,
    )
    for shard in (0, 1):
        assert (run / f"logs/stage1/shard-{shard}-of-2/latest").resolve().name.endswith(".1"), (
            output(tmp_path, job)
        )
    with RecordStore(run / "stage1/store") as store:
        counts = [len(store.keys(kind)) for kind in ("solution", "verification")]
    assert counts[0] == 2 * problems, counts
    assert counts[1] % 4 == 0 and counts[1] > 0


def test_cancelled_job_leaves_no_process_and_can_go_on(
    slurm: Cluster, tmp_path: Path, undisturbed: list[dict]
) -> None:
    """scancel in the middle: no process is left on any node, and submitting again ends as if
    undisturbed.
    """
    run = tmp_path / "run"
    job = train(slurm, tmp_path, run)
    slurm.until(lambda: has_steps(run, 1), "step")
    slurm.run("scancel", job)
    assert slurm.wait_state(job)["JobState"] == "CANCELLED"
    slurm.until(lambda: not slurm.processes_of_jobs(), f"end of {slurm.processes_of_jobs()}", 20)
    assert not has_steps(run, 12), "the signal came too late to test anything"
    again = train(slurm, tmp_path, run)
    assert slurm.wait_state(again)["JobState"] == "COMPLETED", output(tmp_path, again)
    assert rows(run / STAGE_RUN / "metrics.jsonl") == undisturbed


def test_three_requeues_without_progress_are_enough(slurm: Cluster, tmp_path: Path) -> None:
    """A job that is requeued again and again before its first checkpoint ends with the reason, as a
    failure.
    """
    run = tmp_path / "run"
    job = train(slurm, tmp_path, run)
    for restart in range(3):
        slurm.until(
            (run / "logs" / STAGE_RUN / f"{job}.{restart}/job.log").exists, f"attempt {restart}"
        )
        slurm.run("scontrol", "requeue", job)
    ended = slurm.wait_state(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "3"), output(tmp_path, job)
    assert "no progress in three requeues" in output(tmp_path, job).splitlines()[-1]


def test_the_first_failing_rank_has_the_last_word(slurm: Cluster, tmp_path: Path) -> None:
    """Rank 1 dies of an error and rank 0 of its absence: the end of the output is rank 1's
    traceback and the reason.
    """
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
if [[ $SLURM_PROCID == 1 && "$*" == "-m spark_nemo.cli.main stage3 "* ]]; then
    exec {sys.executable} -c 'raise OSError("the disk is gone")'
fi
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    run = tmp_path / "run"
    job = train(slurm, tmp_path, run, PYTHON=python)
    ended = slurm.wait_state(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), output(tmp_path, job)
    last = output(tmp_path, job).splitlines()[-6:]
    assert any(line.startswith("trainer-1 failed first") for line in last), last
    assert last[-2] == "OSError: the disk is gone" and "FAILED" in last[-1], last
    status = slurm.run(
        sys.executable, "-m", "spark_nemo.cli.main", "status", run, env=site(tmp_path)
    ).stdout
    assert "failed" in status and "OSError: the disk is gone" in status, status
    assert "disk is gone" in logged(run, STAGE_RUN, "trainer-1.log")
