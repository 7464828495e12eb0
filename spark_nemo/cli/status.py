"""``spark-nemo status RUN``: the progress of a run, from the run folder's files only.

It covers a chain of Slurm jobs, and stage runs started by hand: their lock tells whether a process
is working on them. A stage run has the name of its folder, such as ``stage1/shard-0-of-8`` or
``stage3/process_aware``.

::

    run.dir/logs/
      chain.tsv                               stage run and id of each job of slurm/pipeline.sh
      slurm/                                  output of the chain's batch scripts
      <stage run>/latest -> <job>.<restart>   one folder per job and restart
      <stage run>/<job>.<restart>/            state, job.log, one log per role and rank, error.txt
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from spark_nemo.cli.arguments import add_command
from spark_nemo.config import ConfigError
from spark_nemo.run.run_folder import DONE, PROGRESS
from spark_nemo.run.run_lock import LOCK, lock_owner

LOGS = "logs"
STATE = "state"
ERROR = "error.txt"
CHAIN = "chain.tsv"
_SHOWN_ERROR_LINES = 12
_FAILED = " FAILED: "


@dataclass(frozen=True)
class StageRunStatus:
    """Progress of one stage run. ``total`` and ``per_second`` are None while unknown."""

    name: str
    state: str
    job: str
    done: int
    total: int | None
    per_second: float | None
    last_update: float | None
    """Seconds since 1970."""
    note: str
    error: str

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the rate of this attempt."""
        if self.total is None or not self.per_second or self.state == "done":
            return None
        return (self.total - self.done) / self.per_second


def add_status_command(commands: argparse._SubParsersAction) -> None:
    """Add ``status``."""
    command = add_command(
        commands, "status", "show how far a run is, here or on a cluster, from its files", _status
    )
    command.add_argument("run_dir", type=Path, metavar="RUN", help="run folder (run.dir)")


def _status(arguments: argparse.Namespace) -> int:
    print(run_status(arguments.run_dir))
    return 0


def run_status(run_dir: Path) -> str:
    """Return the table to print. Raises ``ConfigError`` if the folder has no stage run."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such folder; name a run folder (run.dir)")
    runs = read_status(run_dir)
    if not runs:
        raise ConfigError(f"{run_dir}: no stage has been started or submitted there")
    rows = [
        (
            run.name,
            run.state,
            run.job,
            _shown_progress(run),
            _shown_rate(run),
            _shown_left(run),
            _shown_note(run),
        )
        for run in runs
    ]
    rows.insert(0, ("stage run", "state", "job", "progress", "rate", "time left", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    for run in runs:
        if run.error:
            lines += ["", f"{run.name}, job {run.job}, last error:"]
            lines += [f"  {line}" for line in run.error.split("\n")]
    return "\n".join(lines)


def read_status(run_dir: Path) -> list[StageRunStatus]:
    """Return every stage run that was submitted, started or finished, in stage order."""
    submitted = _submitted(run_dir)
    started = {
        path.parent.relative_to(run_dir / LOGS).as_posix()
        for pattern in ("*/latest", "*/*/latest")
        for path in (run_dir / LOGS).glob(pattern)
    }
    present = {path.parent.relative_to(run_dir).as_posix() for path in _stage_run_files(run_dir)}
    config_file = run_dir / "config.yaml"
    config = yaml.safe_load(config_file.read_text()) if config_file.exists() else {}
    names = [*submitted, *sorted((started | present) - submitted.keys())]
    return [
        _stage_run(run_dir, name, submitted.get(name, ""), config)
        for name in sorted(names, key=_stage)
    ]


def _stage_run_files(run_dir: Path) -> Iterator[Path]:
    for stage in ("stage1", "stage2", "stage3"):
        for name in (DONE, PROGRESS, "metrics.jsonl", LOCK):
            yield from run_dir.glob(f"{stage}/*/{name}")
    yield from (
        path for name in (DONE, "metrics.jsonl", LOCK) if (path := run_dir / "sft" / name).exists()
    )


def _stage(run: str) -> str:
    return {"report": "stage9", "evaluate": "stage8", "sft": "stage0"}.get(
        stage := run.split("/")[0], stage
    )


def _submitted(run_dir: Path) -> dict[str, str]:
    path = run_dir / LOGS / CHAIN
    rows = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    return {run: job for run, job in rows}


def _stage_run(run_dir: Path, name: str, job: str, config: dict) -> StageRunStatus:
    folder, log = run_dir / name, run_dir / LOGS / name / "latest"
    state = _state(log / STATE) or _failed_early(run_dir, job) or ({} if job else _by_lock(folder))
    finished = (folder / DONE).exists() or state.get("STATE") == "done"
    done, total = _progress(folder, config)
    total = total or int(state.get("TOTAL") or 0) or None
    signs = [
        path.stat().st_mtime
        for path in (log / STATE, folder / "metrics.jsonl", folder / PROGRESS)
        if path.exists()
    ]
    last_update = max(signs, default=None)
    rate = None
    if last_update is not None and "STARTED" in state and not finished:
        made, seconds = (
            done - int(state.get("DONE_BEFORE") or 0),
            last_update - float(state["STARTED"]),
        )
        rate = made / seconds if made > 0 and seconds > 0 else None
    error = log / ERROR
    return StageRunStatus(
        name,
        "done" if finished else state.get("STATE", "waiting"),
        state.get("JOB", job),
        done,
        total,
        rate,
        last_update,
        "" if finished else state.get("REASON", ""),
        "\n".join(error.read_text(errors="replace").splitlines()[-_SHOWN_ERROR_LINES:])
        if error.exists() and not finished
        else "",
    )


def _by_lock(folder: Path) -> dict[str, str]:
    """Return the state of a stage run without Slurm logs, from its lock."""
    try:
        owner = lock_owner(folder)
    except OSError as error:
        return {"STATE": "unknown", "REASON": f"its lock cannot be read ({error.strerror})"}
    if owner is None:
        return {"STATE": "interrupted", "REASON": "the same command resumes it"}
    return {
        "STATE": "running",
        "REASON": f"process {owner.get('pid', '?')} on {owner.get('host', '?')}",
    }


def _progress(folder: Path, config: dict) -> tuple[int, int | None]:
    """Return the steps (or verifications) done, and the total if it is known."""
    if (folder / PROGRESS).exists():
        progress = json.loads((folder / PROGRESS).read_text())
        return progress["done"], progress["total"]
    rows = (
        (folder / "metrics.jsonl").read_text().split("\n")[:-1]
        if (folder / "metrics.jsonl").exists()
        else []
    )
    if not rows:
        return 0, None
    last, section = json.loads(rows[-1]), "sft" if folder.name == "sft" else "stage2"
    if last.get("epoch") and config:
        # Stage II and the format SFT: `epoch` is the share of the data seen before the row's step.
        # An epoch ends with a smaller batch, so it is the steps of one that are rounded up.
        return last["step"] + 1, config[section]["epochs"] * math.ceil(
            round(last["step"] / last["epoch"], 6)
        )
    return last["step"] + 1, None


def _state(path: Path) -> dict[str, str]:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _failed_early(run_dir: Path, job: str) -> dict[str, str]:
    """Return the failure of a job that ended before it had a log folder.

    Its reason is in Slurm's own output file.
    """
    for path in (
        (run_dir / LOGS / "slurm").glob(f"*-{job if '_' in job else job + '_*'}.out") if job else ()
    ):
        _, failed, reason = path.read_text(errors="replace").rpartition(_FAILED)
        if failed:
            return {"STATE": "failed", "REASON": reason.splitlines()[0], "JOB": job}
    return {}


def _shown_progress(run: StageRunStatus) -> str:
    unit = "verifications" if run.name.startswith("stage1") else "steps"
    if not run.name.startswith(("stage", "sft")):
        return ""
    return f"{run.done:,} of {run.total:,} {unit}" if run.total else f"{run.done:,} {unit}"


def _shown_rate(run: StageRunStatus) -> str:
    if run.per_second is None:
        return ""
    return f"{run.per_second:.1f}/s" if run.per_second >= 1 else f"{1 / run.per_second:.1f} s each"


def _shown_left(run: StageRunStatus) -> str:
    return "" if run.seconds_left is None else _duration(run.seconds_left)


def _shown_note(run: StageRunStatus) -> str:
    if run.state == "running" and run.last_update is not None:
        sign = f"last update {_duration(time.time() - run.last_update)} ago"
        return f"{run.note}, {sign}" if run.note else sign
    return run.note


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )
