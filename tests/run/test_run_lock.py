"""The lock of a stage run's folder: a second process fails with an error that names the first.

Covers one machine with a local disk, not locks over a network.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from world import command, environment, run

from spark_nemo.cli.status import run_status
from spark_nemo.config import ConfigError
from spark_nemo.run.run_lock import LOCK, lock_owner, run_lock

HOLDER = """
import os, sys, time
from pathlib import Path
from spark_nemo.run.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    forked = sys.argv[2:] and os.fork()
    if not forked:  # the child, where there is one
        print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(
    folder: Path, *, forks: bool = False, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that holds the lock; at the end it and its forked child are killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *(["fork"] if forks else [])],
        text=True,
        stdout=subprocess.PIPE,
        env={**environment(), **variables},
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_the_error_of_a_second_process_names_the_first(tmp_path: Path) -> None:
    """One line names process, host and time.

    Other shards, RL variants and the run folder stay free, and the status can still be read.
    """
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/chain.tsv").write_text("stage1/shard-0-of-2\t5_0\n")
    with holder(tmp_path / "stage1/shard-0-of-2") as other:
        with (
            pytest.raises(
                ConfigError,
                match=rf"shard-0-of-2 is being worked on by process {other.pid} on .* since "
                r"20\d\d-.*; wait for it or end it",
            ) as raised,
            run_lock(tmp_path / "stage1/shard-0-of-2"),
        ):
            pass
        assert "\n" not in str(raised.value)
        for free in ("stage1/shard-1-of-2", "stage3/rlvr", "."):
            with run_lock(tmp_path / free):
                pass
        assert "stage1/shard-0-of-2" in run_status(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("forks", [False, True])
def test_nothing_is_left_of_a_killed_holder(tmp_path: Path, forks: bool) -> None:
    """After SIGKILL the part is free at once, also when a child that it had forked lives on."""
    with holder(tmp_path, forks=forks) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK).read_text(), "it had no time to tidy up"
        with run_lock(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.slow
def test_the_status_shows_the_process_of_a_stage_run_and_interruptions(tmp_path: Path) -> None:
    """A stage run without a Slurm job is running while a process holds its lock.

    After that process is killed or stopped it is interrupted, with the way to resume; a finished
    one is done. Reading the status does not change the lock file.
    """
    part = tmp_path / "stage3/rlvr"

    def line() -> str:
        return next(
            line for line in run_status(tmp_path).splitlines() if line.startswith("stage3/rlvr")
        )

    with holder(part) as other:
        (part / "metrics.jsonl").write_text('{"step": 0}\n')
        written = (part / LOCK).read_text()
        assert re.search(rf" running .* 1 steps .*process {other.pid} on .*, last update", line())
        assert (part / LOCK).read_text() == written
    assert (part / LOCK).read_text(), "it was killed"
    for ended in ("killed", "stopped"):
        assert " interrupted " in line() and line().endswith("the same command resumes it"), ended
        with run_lock(part):
            assert " running " in line() and f"process {os.getpid()} " in line()
    (part / "DONE.json").write_text("{}")
    assert " done " in line() and "resumes" not in line()


def test_a_status_that_looks_at_the_lock_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status command holds the lock for a moment; a run that starts then waits and succeeds."""
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open() as glance:
        fcntl.flock(glance, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(glance, fcntl.LOCK_UN))
        with run_lock(tmp_path):
            assert lock_owner(tmp_path)["pid"] == os.getpid()
    assert lock_owner(tmp_path) is None


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "1",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "a",
        },
    ],
)
def test_only_the_main_rank_takes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict
) -> None:
    """Other ranks of torchrun and tasks of srun neither wait for the lock nor create its file."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with run_lock(tmp_path / "part"):
        assert not (tmp_path / "part").exists()
    monkeypatch.setenv("RANK" if "RANK" in variables else "SLURM_PROCID", "0")
    with run_lock(tmp_path / "part"):
        assert (tmp_path / "part" / LOCK).exists()


@pytest.mark.slow
def test_a_requeued_job_does_not_wait_for_its_own_lost_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server may keep a dead node's lock: the next start of the same Slurm job continues.

    A second start by hand within that job still fails, and so does another job.
    """
    with holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1"):
        for job, start, goes_on in (("7", "2", True), ("7", "1", False), ("8", "2", False)):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", start)
            if goes_on:
                with run_lock(tmp_path):
                    pass
            else:
                with pytest.raises(ConfigError, match="is being worked on"), run_lock(tmp_path):
                    pass


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some parallel file systems have no locks: the run continues with a warning.

    Any other error of the system is raised.
    """

    def fails(number: int):
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOLCK))
    with run_lock(tmp_path / "sft"):
        assert " unknown " in run_status(tmp_path), "no lock tells whether it is running"
    assert "cannot be locked" in caplog.text
    monkeypatch.setattr(fcntl, "flock", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), run_lock(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_fails_while_another_runs_and_starts_after_its_death(
    tmp_path: Path, ranks: int
) -> None:
    """The second start of the format SFT exits with 2 and one line, and the first continues.

    After SIGKILL of the first the same command runs to its end. With two ranks the launcher fails
    before it starts any rank.
    """
    overrides = ("data.sft_examples=toy:sft:40", f"megatron.data_parallel={ranks}")
    lock = tmp_path / "sft" / LOCK
    first = subprocess.Popen(
        command("sft", tmp_path, *overrides), env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        owner, deadline = None, time.monotonic() + 100
        while owner is None or (
            ranks > 1 and owner == first.pid
        ):  # the launcher has it for a moment
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
            text = lock.read_text() if lock.exists() else ""
            owner = json.loads(text)["pid"] if text else None
        os.kill(owner, signal.SIGSTOP)  # or it might be done before the second one asks
        second = run("sft", tmp_path, *overrides)
        assert second.returncode == 2 and f"worked on by process {owner} on" in second.stderr
        assert second.stderr.count("spark-nemo: error:") == 1
    finally:
        first.kill()
        first.wait()
    done = run("sft", tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert lock.read_text() == "" and (tmp_path / "sft/DONE.json").exists()
