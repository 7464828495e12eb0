"""``spark-nemo status`` of a run folder that Slurm jobs write; the tests write the files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spark_nemo.cli.status import read_status, run_status
from spark_nemo.config import ConfigError


def attempt(run: Path, part: str, name: str, **state: object) -> Path:
    folder = run / "logs" / part / name
    folder.mkdir(parents=True)
    (folder / "state").write_text("".join(f"{key}={value}\n" for key, value in state.items()))
    latest = folder.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(name)
    return folder


def write_rows(run: Path, part: str, rows: list[dict]) -> Path:
    path = run / part / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_running_part_has_rate_and_time_left(tmp_path: Path) -> None:
    """Rate and time left are this attempt's: steps since its start over the time to its last sign
    of life.
    """
    metrics = write_rows(tmp_path, "stage3/process_aware", [{"step": i} for i in range(50)])
    log = attempt(
        tmp_path,
        "stage3/process_aware",
        "7.1",
        STATE="running",
        JOB=7,
        TOTAL=80,
        STARTED=1000,
        DONE_BEFORE=40,
    )
    for path in (log / "state", metrics):
        os.utime(path, (1100, 1100))
    (part,) = read_status(tmp_path)
    assert (part.done, part.total, part.per_second, part.seconds_left) == (50, 80, 0.1, 300)
    assert "50 of 80 steps  10.0 s each  5 min 00 s" in run_status(tmp_path)


def test_stage_2_tells_its_total_from_the_epoch(tmp_path: Path) -> None:
    """51 examples in batches of 4 over 2 epochs are 26 steps; the metrics know only the share of an
    epoch.
    """
    (tmp_path / "config.yaml").write_text("stage2: {epochs: 2}\n")
    write_rows(tmp_path, "stage2/single", [{"step": i, "epoch": i * 4 / 51} for i in range(8)])
    attempt(tmp_path, "stage2/single", "3.0", STATE="running", JOB=3, TOTAL=0, STARTED=0)
    (part,) = read_status(tmp_path)
    assert (part.done, part.total) == (8, 26)
    # 14 examples: four steps an epoch, the last of them half a batch.
    (tmp_path / "stage2/single/metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "epoch": i * 4 / 14}) + "\n" for i in range(8))
    )
    (part,) = read_status(tmp_path)
    assert (part.done, part.total) == (8, 8)


def test_the_newest_attempt_s_error_is_shown_until_the_part_is_done(tmp_path: Path) -> None:
    """A failed job's last words are repeated; a later DONE marker ends them."""
    log = attempt(
        tmp_path,
        "stage2/single",
        "3.0",
        STATE="failed",
        JOB=3,
        REASON="it ended without its marker",
    )
    (log / "error.txt").write_text("trainer-1 failed first:\nOSError: no space left\n")
    text = run_status(tmp_path)
    assert (
        "failed" in text
        and "it ended without its marker" in text
        and "OSError: no space left" in text
    )
    (tmp_path / "stage2/single").mkdir(parents=True)
    (tmp_path / "stage2/single/DONE.json").write_text("{}")
    assert "OSError" not in run_status(tmp_path) and " done " in run_status(tmp_path)


def test_submitted_stage_runs_wait_in_the_order_of_the_stages(tmp_path: Path) -> None:
    """Jobs that pipeline.sh submitted and that have not started are listed with their ids."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/chain.tsv").write_text(
        "report\t9\nstage3/rlvr\t8\nstage1/shard-0-of-1\t5_0\n"
    )
    parts = read_status(tmp_path)
    assert [(part.name, part.state, part.job) for part in parts] == [
        ("stage1/shard-0-of-1", "waiting", "5_0"),
        ("stage3/rlvr", "waiting", "8"),
        ("report", "waiting", "9"),
    ]


def test_a_job_refused_before_it_had_a_log_folder_says_why(tmp_path: Path) -> None:
    """A configuration error ends a job before its part is known: the reason is in Slurm's output
    file.
    """
    slurm = tmp_path / "logs/slurm"
    slurm.mkdir(parents=True)
    (tmp_path / "logs/chain.tsv").write_text("stage1/shard-0-of-1\t5_0\nstage2/single\t6\n")
    (slurm / "spark-stage2-6_4294967294.out").write_text(
        "error: no store\n[x 6.0 n] FAILED: the plan was refused\n"
    )
    assert [(part.state, part.note) for part in read_status(tmp_path)] == [
        ("waiting", ""),
        ("failed", "the plan was refused"),
    ]


def test_nothing_to_tell_is_an_error(tmp_path: Path) -> None:
    """A misspelt run folder must not look like a run that has not begun."""
    with pytest.raises(ConfigError, match="no stage"):
        run_status(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        run_status(tmp_path / "absent")


def test_the_format_sft_is_a_stage_run_of_its_own(tmp_path: Path) -> None:
    """Its total comes from its own epochs, and it is listed before the stages."""
    (tmp_path / "config.yaml").write_text("sft: {epochs: 3}\nstage2: {epochs: 2}\n")
    write_rows(tmp_path, "stage3/random", [{"step": 0}])
    write_rows(tmp_path, "sft", [{"step": i, "epoch": i * 4 / 51} for i in range(8)])
    parts = read_status(tmp_path)
    assert [part.name for part in parts] == ["sft", "stage3/random"] and (
        parts[0].done,
        parts[0].total,
    ) == (8, 39)
    assert "8 of 39 steps" in run_status(tmp_path)
