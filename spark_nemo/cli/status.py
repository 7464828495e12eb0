"""``spark-nemo status RUN``: how far a run is, from the run folder's files only: a chain of Slurm
jobs, or parts that were started by hand, whose lock tells whether anybody is at them.

::

    run.dir/logs/
      chain.tsv                          part and job id of what slurm/pipeline.sh submitted
      slurm/                             what the batch scripts of the chain said
      <part>/latest -> <job>.<restart>   one folder per job and restart
      <part>/<job>.<restart>/            state, job.log, one log per role and rank, error.txt after a failure

A part is a stage's folder, such as ``stage1/shard-0-of-8`` or ``stage3/process_aware``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from spark_nemo.config import ConfigError
from spark_nemo.run.run_folder import DONE, PROGRESS
from spark_nemo.run.run_lock import LOCK, lock_owner

LOGS, STATE, ERROR, CHAIN = "logs", "state", "error.txt", "chain.tsv"
_SHOWN_ERROR_LINES = 12
_FAILED = " FAILED: "


@dataclass(frozen=True)
class PartStatus:
    """One part; ``total`` and ``per_second`` are None while nothing tells them. Times are seconds
    since 1970.
    """

    name: str
    state: str
    job: str
    done: int
    total: int | None
    per_second: float | None
    last_sign: float | None
    note: str
    error: str

    @property
    def seconds_left(self) -> float | None:
        """At the rate of this attempt."""
        if self.total is None or not self.per_second or self.state == "done":
            return None
        return (self.total - self.done) / self.per_second


def run_status(run_dir: Path) -> str:
    """The table that ``spark-nemo status`` prints. Raises ``ConfigError`` when there is nothing to
    tell.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such run folder")
    parts = read_status(run_dir)
    if not parts:
        raise ConfigError(f"{run_dir}: no stage has been started or submitted there")
    rows = [
        (p.name, p.state, p.job, _shown_progress(p), _shown_rate(p), _shown_left(p), _shown_note(p))
        for p in parts
    ]
    rows.insert(0, ("part", "state", "job", "progress", "rate", "time left", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    for part in parts:
        if part.error:
            lines += ["", f"{part.name}, job {part.job}, last error:"]
            lines += [f"  {line}" for line in part.error.split("\n")]
    return "\n".join(lines)


def read_status(run_dir: Path) -> list[PartStatus]:
    """Every part that was submitted, started or finished, in the order of the stages."""
    submitted = _submitted(run_dir)
    started = {
        path.parent.relative_to(run_dir / LOGS).as_posix()
        for pattern in ("*/latest", "*/*/latest")
        for path in (run_dir / LOGS).glob(pattern)
    }
    present = {path.parent.relative_to(run_dir).as_posix() for path in _part_files(run_dir)}
    config_file = run_dir / "config.yaml"
    config = yaml.safe_load(config_file.read_text()) if config_file.exists() else {}
    names = [*submitted, *sorted((started | present) - submitted.keys())]
    return [
        _part(run_dir, name, submitted.get(name, ""), config) for name in sorted(names, key=_stage)
    ]


def _part_files(run_dir: Path) -> Iterator[Path]:
    for stage in ("stage1", "stage2", "stage3"):
        for name in (DONE, PROGRESS, "metrics.jsonl", LOCK):
            yield from run_dir.glob(f"{stage}/*/{name}")
    yield from (
        path for name in (DONE, "metrics.jsonl", LOCK) if (path := run_dir / "sft" / name).exists()
    )


def _stage(part: str) -> str:
    return {"report": "stage9", "evaluate": "stage8", "sft": "stage0"}.get(
        stage := part.split("/")[0], stage
    )


def _submitted(run_dir: Path) -> dict[str, str]:
    path = run_dir / LOGS / CHAIN
    rows = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    return {part: job for part, job in rows}


def _part(run_dir: Path, name: str, job: str, config: dict) -> PartStatus:
    folder, log = run_dir / name, run_dir / LOGS / name / "latest"
    state = _state(log / STATE) or _refused(run_dir, job) or ({} if job else _by_lock(folder))
    finished = (folder / DONE).exists() or state.get("STATE") == "done"
    done, total = _progress(folder, config)
    total = total or int(state.get("TOTAL") or 0) or None
    signs = [
        path.stat().st_mtime
        for path in (log / STATE, folder / "metrics.jsonl", folder / PROGRESS)
        if path.exists()
    ]
    last_sign = max(signs, default=None)
    rate = None
    if last_sign is not None and "STARTED" in state and not finished:
        made, seconds = (
            done - int(state.get("DONE_BEFORE") or 0),
            last_sign - float(state["STARTED"]),
        )
        rate = made / seconds if made > 0 and seconds > 0 else None
    error = log / ERROR
    return PartStatus(
        name,
        "done" if finished else state.get("STATE", "waiting"),
        state.get("JOB", job),
        done,
        total,
        rate,
        last_sign,
        "" if finished else state.get("REASON", ""),
        "\n".join(error.read_text(errors="replace").splitlines()[-_SHOWN_ERROR_LINES:])
        if error.exists() and not finished
        else "",
    )


def _by_lock(folder: Path) -> dict[str, str]:
    """Of a part that no Slurm job left a word about."""
    try:
        owner = lock_owner(folder)
    except OSError as error:
        return {"STATE": "unknown", "REASON": f"its lock cannot be asked ({error.strerror})"}
    if owner is None:
        return {"STATE": "interrupted", "REASON": "the same command resumes it"}
    return {
        "STATE": "running",
        "REASON": f"process {owner.get('pid', '?')} on {owner.get('host', '?')}",
    }


def _progress(folder: Path, config: dict) -> tuple[int, int | None]:
    """Steps (or verifications) done and in total."""
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


def _refused(run_dir: Path, job: str) -> dict[str, str]:
    """A job that ended before it had a log folder said why in Slurm's own output file."""
    for path in (
        (run_dir / LOGS / "slurm").glob(f"*-{job if '_' in job else job + '_*'}.out") if job else ()
    ):
        _, failed, reason = path.read_text(errors="replace").rpartition(_FAILED)
        if failed:
            return {"STATE": "failed", "REASON": reason.splitlines()[0], "JOB": job}
    return {}


def _shown_progress(part: PartStatus) -> str:
    unit = "verifications" if part.name.startswith("stage1") else "steps"
    if not part.name.startswith(("stage", "sft")):
        return ""
    return f"{part.done:,} of {part.total:,} {unit}" if part.total else f"{part.done:,} {unit}"


def _shown_rate(part: PartStatus) -> str:
    if part.per_second is None:
        return ""
    return (
        f"{part.per_second:.1f}/s" if part.per_second >= 1 else f"{1 / part.per_second:.1f} s each"
    )


def _shown_left(part: PartStatus) -> str:
    return "" if part.seconds_left is None else _duration(part.seconds_left)


def _shown_note(part: PartStatus) -> str:
    if part.state == "running" and part.last_sign is not None:
        sign = f"last sign of life {_duration(time.time() - part.last_sign)} ago"
        return f"{part.note}, {sign}" if part.note else sign
    return part.note


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
