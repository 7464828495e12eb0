"""Run a handful of dependent commands on this machine, some at a time. On a cluster Slurm does this
instead.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spark_nemo.run.run_folder import DONE, PROGRESS, read_done
from spark_nemo.run.subprocess_utils import start_child
from spark_nemo.utils.progress_bar import progress_bar

log = logging.getLogger(__name__)
_POLL_S = 0.3
_LOG_START = "--- spark-nemo "
_ERROR = "spark-nemo: error: "


class JobFailed(RuntimeError):
    """A job ended without its marker; the message names its log."""


@dataclass(frozen=True)
class Job:
    """``spark-nemo`` with ``arguments``, once every job named in ``after`` is done.

    ``folder`` is where the job writes its DONE marker and its progress.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    after: frozenset[str] = field(default=frozenset())


def run_job_graph(jobs: Sequence[Job], at_once: int, logs: Path) -> bool:
    """Run the unfinished jobs in order, at most ``at_once`` together. Returns False when stopped by
    a signal.

    A signal is passed on to the running jobs, which write their checkpoints; the same call resumes.
    Raises ``JobFailed`` with the last line of the log when a job fails; the others are stopped
    first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done = {job.name for job in jobs if read_done(job.folder) is not None}
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    stopping = _StopRequest()
    with (
        stopping,
        _stopped_at_the_end(running),
        progress_bar(total=len(jobs), initial=len(done), desc="pipeline", unit="job") as bar,
    ):
        while len(done) < len(jobs):
            if stopping.requested and not running:
                return False
            for job in jobs:
                ready = job.name not in done and job.name not in running and job.after <= done
                if ready and len(running) < at_once and not stopping.requested:
                    running[job.name] = (job, _start(job, logs), time.monotonic())
            for name, (job, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if read_done(job.folder) is not None:
                    done.add(name)
                    bar.update()
                    bar.write(
                        f"{name}: done in {time.monotonic() - started:.0f} s", file=sys.stderr
                    )
                elif not stopping.requested:
                    raise JobFailed(
                        f"{name} failed: {_last_line(logs / f'{name}.log')} (log: {logs / f'{name}.log'})"
                    )
            stopping.pass_on([process for _, process, _ in running.values()])
            bar.set_postfix_str(
                ", ".join(f"{n} {_progress(j.folder)}" for n, (j, _, _) in running.items())
            )
            time.sleep(_POLL_S)
    return True


class _StopRequest:
    """Remembers SIGINT or SIGTERM and hands each to the jobs: the first asks for a checkpoint, a
    second kills.
    """

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

    def _on_signal(self, *_: object) -> None:
        self.requested, self._passed_on = True, False

    def pass_on(self, processes: list[subprocess.Popen[bytes]]) -> None:
        if self.requested and not self._passed_on:
            self._passed_on = True
            for process in processes:
                process.send_signal(signal.SIGTERM)


def _start(job: Job, logs: Path) -> subprocess.Popen[bytes]:
    with (logs / f"{job.name}.log").open("ab") as file:
        file.write(f"{_LOG_START}{' '.join(job.arguments)}\n".encode())
        file.flush()
        return start_child(job.arguments, output=file)


@contextmanager
def _stopped_at_the_end(
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]],
) -> Iterator[None]:
    """Whatever ends the block, no job goes on without the pipeline."""
    try:
        yield
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _progress(folder: Path) -> str:
    path, metrics = folder / PROGRESS, folder / "metrics.jsonl"
    if path.exists():
        state = json.loads(path.read_text())
        return f"{state['done']}/{state['total']}"
    if metrics.exists() and (lines := metrics.read_text().splitlines()):
        return f"step {len(lines)}"
    return "starting" if not (folder / DONE).exists() else ""


def _last_line(path: Path) -> str:
    """What the last attempt said at its end: its one-line error, or else its last line that is no
    progress bar.
    """
    text = path.read_text(errors="replace").rpartition(_LOG_START)[2]
    if (start := text.rfind(_ERROR)) >= 0:
        return text[start + len(_ERROR) :].splitlines()[0][:300]
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip() and "%|" not in line]
    return lines[-1][:300] if lines else "no output"
