"""Comparison of runs over seeds: intervals worked out by hand, verdicts, the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_summary import example_summary

from spark_nemo.cli.main import main
from spark_nemo.report import SummaryError, compare_runs, comparison_markdown, comparison_page


def of(*runs: dict) -> list[tuple[str, dict]]:
    return [("", run) for run in runs]


def with_f1(seed: int, single: float, step: float) -> dict:
    summary = example_summary(seed)
    for name, f1 in (("single", single), ("step_consistency", step)):
        summary["stage2"]["f1"][name] = summary["stage2"]["methods"][name]["f1"]["value"] = f1
        summary["stage2"]["methods"][name]["f1"].update(low=0.0, high=1.0)
    return summary


def pair(comparison, first: str, second: str):
    [found] = [p for p in comparison.pairs if first in p.first and second in p.second]
    return found


def test_a_pair_differs_only_when_the_interval_of_its_paired_difference_excludes_zero() -> None:
    """Seeds are paired: seeds far apart that agree on a small gain differ, uneven ones do not.

    Differences of 0.1, 0.2, 0.3 have mean 0.2 and half-width 4.303 * 0.1 / sqrt(3) = 0.2484.
    """
    clear = compare_runs(of(with_f1(0, 0.1, 0.2), with_f1(1, 0.5, 0.61), with_f1(2, 0.8, 0.9)))
    assert pair(clear, "Single", "Step").verdict == "differs"
    wide = pair(
        compare_runs(of(with_f1(0, 0.3, 0.2), with_f1(1, 0.5, 0.3), with_f1(2, 0.8, 0.5))),
        "Single",
        "Step",
    )
    assert (wide.mean, wide.half) == pytest.approx((0.2, 0.2484), abs=1e-4)
    assert wide.verdict == "does not differ"


def test_one_seed_gives_no_verdict() -> None:
    """One seed has no interval; reward models are never compared with policies."""
    comparison = compare_runs(of(example_summary(0)))
    assert {p.verdict for p in comparison.pairs} == {"–"} and all(
        p.half is None for p in comparison.pairs
    )
    assert len(comparison.pairs) == 6  # three methods, three RL variants


def test_groups_are_compared_over_the_seeds_they_share() -> None:
    """A seed that only one group has counts for its mean and not for the pair."""
    runs = [("old", with_f1(seed, 0.5, 0.6)) for seed in range(3)]
    runs += [("new", with_f1(seed, 0.5, 0.7 + seed / 100)) for seed in range(2)]
    comparison = compare_runs(runs)
    found = pair(comparison, "old: Step", "new: Step")
    assert found.seeds == 2 and found.mean == pytest.approx(-0.105)
    assert next(len(q.values) for q in comparison.quantities if q.name.startswith("old: Step")) == 3


def test_a_seed_does_not_count_twice() -> None:
    """Two runs of one seed in a group are an error."""
    with pytest.raises(SummaryError, match=r"seed \[0\]"):
        compare_runs(of(example_summary(0), example_summary(0)))


def test_the_page_is_whole_html_with_a_band_for_every_curve() -> None:
    """Tags are closed; two curves in two charts have bands from three seeds, none from one seed."""
    page = comparison_page(compare_runs(of(*(example_summary(s, s / 50) for s in range(3)))))
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "line", "path", "circle", "rect", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("meta", "line", "path", "circle", "rect"):
                assert open_tags.pop() == tag

    Checker().feed(page)
    assert not open_tags and page.count('opacity=".14"') == 4
    assert 'opacity=".14"' not in comparison_page(compare_runs(of(example_summary(0))))
    assert "differs" in page and "http" not in page.replace("http://www.w3.org", "")


def test_the_command_reads_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders may have a group name; a folder without a summary is a one-line error."""
    for seed in range(3):
        (tmp_path / f"run{seed}").mkdir()
        (tmp_path / f"run{seed}/summary.json").write_text(
            json.dumps(example_summary(seed, seed / 50))
        )
    folders = [str(tmp_path / f"run{seed}") for seed in range(3)]
    assert main(["report", "compare", *folders, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| first | second |" in shown and (tmp_path / "out/compare.md").read_text() in shown
    assert (tmp_path / "out/compare.html").exists()
    assert main(["report", "compare", f"a={folders[0]}", f"b={folders[1]}"]) == 0
    assert "| a: " in capsys.readouterr().out
    assert main(["report", "compare", str(tmp_path)]) == 2
    assert "summary.json: cannot be read" in capsys.readouterr().err
    assert comparison_markdown(compare_runs(of(example_summary(0)))).count("–") > 6
