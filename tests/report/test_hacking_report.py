"""Reward hacking in the report and in docs/results.md, from made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_summary import example_summary
from studies.hacking_table import ExploitRow, hacking_section

from spark_nemo.report import SummaryError, read_summary, report_page
from spark_nemo.report.collect_summary import _curve
from spark_nemo.report.hacking_view import hacking_views


def monitored_run() -> dict:
    summary = example_summary()
    for point in summary["stage3"]["curves"]["spark"]:
        point["hacking"] = {"judge_directed": point["step"] / 200, "empty_text": 0.0}
    summary["stage3"]["probes"] = {
        "spark": [
            {"kind": "empty_steps", "asked": 8, "accepted": 3, "refused_by": "empty_step"},
            {"kind": "one_step", "asked": 8, "accepted": 0, "failed": 2},
        ]
    }
    return summary


def test_reward_and_true_accuracy_share_a_chart_and_detectors_have_another() -> None:
    """Only monitored RL variants have a view; a detector that never fired is named, not drawn."""
    (view,) = hacking_views(read_summary(monitored_run()).stage3)
    assert view.rl_variant == "spark" and view.silent == ["empty text"]
    assert [name for _, name in view.legend] == ["judge directed"]
    assert (
        "Reward and true accuracy by RL step" in view.reward
        and "Detectors by RL step" in view.detectors
    )


def test_the_page_shows_probes_with_the_constraint_that_rejects_them() -> None:
    """An accepted probe matters most when no constraint rejects it; the page shows both."""
    page = report_page(monitored_run())
    assert "Is the reward being hacked?" in page and "3 of 8" in page and "empty step" in page
    assert "2 without a verdict" in page


def test_a_run_without_detectors_has_no_section_about_hacking() -> None:
    """Detectors may be switched off."""
    assert hacking_views(read_summary(example_summary()).stage3) == []
    assert "Is the reward being hacked?" not in report_page(example_summary())


def test_curves_read_detector_rates_from_metrics_and_nothing_else(tmp_path: Path) -> None:
    """``hacking/mean_steps`` is not a share of responses and stays out of the detectors' chart."""
    row = {"step": 0, "reward": 0.5, "hacking/judge_directed": 0.25, "hacking/mean_steps": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (point,) = _curve(tmp_path, [])
    assert point.hacking == {"judge_directed": 0.25}


def outcome(rate: float, accuracy: float) -> dict[str, float]:
    return {"rate_last": rate, "reward_last": 0.9, "accuracy_last": accuracy, "accuracy_first": 0.2}


def section(rates: tuple[float, ...]) -> str:
    rows = [
        ExploitRow(
            "empty_text",
            "finds nothing",
            "`no_empty_steps=true`",
            0.08,
            [outcome(rate, 0.1) for rate in rates],
            [outcome(0.0, 0.8)] * len(rates),
        )
    ]
    return hacking_section(rows, "python x", steps=14, responses=144)


def test_the_table_counts_the_seeds_in_which_an_exploit_was_found() -> None:
    """An exploit counts as found in a seed when at least half of the last responses use it."""
    text = " ".join(section((0.9, 0.2, 0.8)).split())
    assert "| 2 of 3 | 0 of 3 |" in text and "over 3 seeds" in text
    assert "in 8 % of the SFT text" in text and "(20.0 % solved before RL)" in text


def test_a_table_with_missing_runs_is_rejected() -> None:
    """Means over different seeds would not be comparable."""
    row = ExploitRow("x", "y", "z", 0.1, [outcome(1, 0)], [])
    with pytest.raises(SummaryError, match="number of seeds"):
        hacking_section([row], "c", steps=1, responses=1)
