"""Run a graph of dependent commands on this machine. On a cluster Slurm does this instead."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from spark_nemo.config import SparkConfig
from spark_nemo.run.run_folder import DONE, PROGRESS, read_done
from spark_nemo.run.subprocess_utils import start_child
from spark_nemo.utils.progress_bar import progress_bar

log = logging.getLogger(__name__)
_POLL_S = 0.3
_MAX_PARALLEL_JOBS = 8  # each holds a model and a gigabyte of libraries in memory
_LOG_START = "--- spark-nemo "
_ERROR = "spark-nemo: error: "


class JobFailed(RuntimeError):
    """A job ended without its DONE marker. The message names its log."""


@dataclass(frozen=True)
class Job:
    """One ``spark-nemo`` command, to run once every job named in ``after`` is done."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    """Where the command writes its DONE marker and its progress."""
    after: frozenset[str] = field(default=frozenset())


@dataclass(frozen=True)
class _RunningJob:
    job: Job
    process: subprocess.Popen[bytes]
    started: float


def parallel_jobs(config: SparkConfig) -> int:
    """Return how many jobs run at the same time: ``pipeline.parallel_jobs`` with auto resolved.

    Results do not depend on it: seeds come from record keys, and labels are read in key order.
    """
    configured = config.pipeline.parallel_jobs
    if not isinstance(configured, str):
        return configured
    if config.engine.launches_servers or torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores // config.megatron.world_size, _MAX_PARALLEL_JOBS))


def run_job_graph(jobs: Sequence[Job], at_once: int, logs: Path) -> bool:
    """Run the unfinished jobs in order, at most ``at_once`` at the same time.

    Returns False if a signal stopped it. The signal is passed on to the running jobs, which write
    their checkpoints; the same call resumes. Raises ``JobFailed`` with the last line of the log
    when a job fails, after it stopped the others.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done = {job.name for job in jobs if read_done(job.folder) is not None}
    running: dict[str, _RunningJob] = {}
    stop = _StopRequest()
    bar = progress_bar(total=len(jobs), initial=len(done), desc="pipeline", unit="job")
    with stop, _terminate_at_exit(running), bar:
        while len(done) < len(jobs):
            if stop.requested and not running:
                return False
            if not stop.requested:
                for job in _ready(jobs, done, running)[: at_once - len(running)]:
                    running[job.name] = _RunningJob(job, _start(job, logs), time.monotonic())
            for name, active in list(running.items()):
                if active.process.poll() is None:
                    continue
                del running[name]
                # The marker decides, not the exit status: a job that was stopped also exits with 0.
                if read_done(active.job.folder) is not None:
                    done.add(name)
                    bar.update()
                    seconds = time.monotonic() - active.started
                    bar.write(f"{name}: done in {seconds:.0f} s", file=sys.stderr)
                elif not stop.requested:
                    log_file = logs / f"{name}.log"
                    raise JobFailed(f"{name} failed: {_last_error(log_file)} (log: {log_file})")
            stop.pass_on(running)
            bar.set_postfix_str(
                ", ".join(f"{name} {_progress(each.job.folder)}" for name, each in running.items())
            )
            time.sleep(_POLL_S)
    return True


def _ready(jobs: Sequence[Job], done: set[str], running: dict[str, _RunningJob]) -> list[Job]:
    return [
        job
        for job in jobs
        if job.name not in done and job.name not in running and job.after <= done
    ]


class _StopRequest:
    """SIGINT and SIGTERM, each passed on once: the first asks for a checkpoint, a second kills."""

    def __init__(self) -> None:
        self.requested = False
        self._passed_on = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._passed_on = False

    def pass_on(self, running: dict[str, _RunningJob]) -> None:
        """Send a signal that arrived since the last call to every running job."""
        if self.requested and not self._passed_on:
            self._passed_on = True
            for active in running.values():
                active.process.send_signal(signal.SIGTERM)


def _start(job: Job, logs: Path) -> subprocess.Popen[bytes]:
    with (logs / f"{job.name}.log").open("ab") as file:
        file.write(f"{_LOG_START}{' '.join(job.arguments)}\n".encode())
        file.flush()
        return start_child(job.arguments, output=file)


@contextmanager
def _terminate_at_exit(running: dict[str, _RunningJob]) -> Iterator[None]:
    """Terminate the running jobs when the block ends, also by an error."""
    try:
        yield
    finally:
        for active in running.values():
            active.process.terminate()
        for active in running.values():
            active.process.wait()


def _progress(folder: Path) -> str:
    if (folder / PROGRESS).exists():
        state = json.loads((folder / PROGRESS).read_text())
        return f"{state['done']}/{state['total']}"
    metrics = folder / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    if rows:
        return f"step {len(rows)}"
    return "" if (folder / DONE).exists() else "starting"


def _last_error(log_file: Path) -> str:
    """Return the last attempt's one-line error, or its last line that is not a progress bar."""
    text = log_file.read_text(errors="replace").rpartition(_LOG_START)[2]
    _, found, error = text.rpartition(_ERROR)
    if found:
        return error.splitlines()[0][:300]
    lines = [line.strip() for line in text.splitlines()[1:]]
    lines = [line for line in lines if line and "%|" not in line]
    return lines[-1][:300] if lines else "no output"
