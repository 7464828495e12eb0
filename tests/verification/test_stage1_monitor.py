"""Progress of stage I while it runs, and the bound on its failure rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spark_nemo.config import Stage1Config
from spark_nemo.run.run_folder import progress
from spark_nemo.verification.sampler import SamplingCounts
from spark_nemo.verification.stage1_monitor import (
    SamplingSpeed,
    Stage1Monitor,
    TokenAccountingFile,
    TooManyFailures,
    check_failure_rates,
)
from spark_nemo.verification.token_accounting import Distribution, TokenAccounting


def test_a_run_that_mostly_fails_is_stopped_once_enough_was_seen(tmp_path: Path) -> None:
    """Proves that 199 failures do not stop a run and 200 do, before the end and with the bound in
    the message.
    """
    stage = Stage1Config(max_failure_rate=0.5)
    with progress(tmp_path, 10_000, "verification") as bar:
        monitor = Stage1Monitor(stage, 10_000, bar.update)
        monitor(SamplingCounts(verifications=199, failed_verifications=199))
        monitor(SamplingCounts(verifications=200, failed_verifications=100))
        with pytest.raises(
            TooManyFailures, match=r"stage1.max_failure_rate=0.5: 101 of 200 verifications"
        ):
            monitor(SamplingCounts(verifications=200, failed_verifications=101))
        with pytest.raises(TooManyFailures, match="200 of 300 solutions"):
            monitor(SamplingCounts(solutions=300, unusable_solutions=200))
    with pytest.raises(TooManyFailures, match="3 of 4 solutions"):
        check_failure_rates(SamplingCounts(solutions=4, unusable_solutions=3), 0.5)


def test_speed_and_time_left_are_those_of_sampling() -> None:
    """Proves the figures of the progress line; results found in the store count as done and not as
    sampled.
    """
    rates = SamplingSpeed(total=10_000)
    assert (
        rates.note(4000, SamplingCounts(verifications=4000, reused_verifications=4000), now=0.0)
        == ""
    )
    counts = SamplingCounts(
        verifications=4400,
        reused_verifications=4000,
        saved_verifications=100,
        solution_tokens=1000,
        verification_tokens=19_000,
    )
    assert rates.note(4500, counts, now=10.0) == "40 verifications/s, 2,000 tokens/s, 1:50 left"


def test_the_progress_file_keeps_its_three_fields(tmp_path: Path) -> None:
    """Proves what the pipeline's own bar reads: done counts votes that will never be asked for."""
    stage = Stage1Config(verifications_per_solution=4)
    with progress(tmp_path, 100, "verification") as bar:
        monitor = Stage1Monitor(stage, 100, bar.update)
        monitor.show(
            SamplingCounts(
                solutions=5,
                unusable_solutions=2,
                verifications=6,
                saved_verifications=5,
                postponed_verifications=1,
                failed_verifications=1,
            )
        )
    written = json.loads((tmp_path / "progress.json").read_text())
    assert written == {"done": 20, "total": 100, "note": "5 solutions, 2 unusable, 1 failed"}


def test_the_token_accounting_file_adds_up_over_runs(tmp_path: Path) -> None:
    """Proves that saving twice in one run counts once, and that the next run adds to it."""
    path = tmp_path / "accounting.json"
    for run, expected in ((1, 1), (2, 2)):
        accounting = TokenAccounting(1)
        file = TokenAccountingFile(path, accounting)
        file.save()
        accounting.costs["solve"].add_sampled(10, 20, 0.5)
        file.save()
        file.save()
        assert json.loads(path.read_text())["all_runs"]["solve"]["sampled"] == expected == run


def test_percentiles_of_a_stream() -> None:
    """Proves that percentiles are within 1 % of the nearest rank, and mean and extremes exact,
    zeros included.
    """
    spread = Distribution()
    for value in (0, *range(1, 1000)):
        spread.add(value)
    summary = spread.summary()
    assert (summary["count"], summary["mean"], summary["min"], summary["max"]) == (
        1000,
        499.5,
        0,
        999,
    )
    for name, wanted in (("p10", 99), ("p50", 499), ("p90", 899), ("p99", 989)):
        assert summary[name] == pytest.approx(wanted, rel=0.0101)
    assert Distribution().summary() == {"count": 0}
