"""Scores over several benchmarks, and two runs compared problem by problem."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scripted_engine import Bytes, Scripted

from spark_nemo.cli.main import main
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.evaluation import DataFileError, mean_estimate
from spark_nemo.evaluation.bootstrap import grouped_mean_estimate
from spark_nemo.evaluation.math_compare import compare_completions
from spark_nemo.evaluation.math_data import read_math_sets
from spark_nemo.evaluation.saved_completions import (
    SavedCompletion,
    average_estimates,
    score_sets,
    write_completions,
)
from spark_nemo.toy.resolve import ASSETS

pytestmark = pytest.mark.slow

SIZES = {"amc23": 40, "aime25": 30}


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    for name, size in SIZES.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"id": i, "problem": f"{name} {i}?", "answer": i}) + "\n"
                for i in range(size)
            )
        )
    return [tmp_path / f"{name}.jsonl" for name in SIZES]


def saved(path: Path, right: Mapping[str, set[int]], samples: int = 0, greedy: bool = True) -> Path:
    """A run that solves the problems in ``right``, greedily and in every sample."""
    rows = []
    for name, size in SIZES.items():
        for i in range(size):
            text = f"\\boxed{{{i if i in right[name] else -5}}}"
            rows += [SavedCompletion(f"{name}-{i}", 0, True, text)] * greedy
            rows += [SavedCompletion(f"{name}-{i}", k, False, text) for k in range(samples)]
    write_completions(path, rows)
    return path


def test_the_mean_of_groups_weighs_them_alike_and_resamples_within_them() -> None:
    """Groups weigh alike; the width is half the root of the summed variances."""
    rng = np.random.default_rng(0)
    small, large = rng.random(40) < 0.5, rng.random(400) < 0.5
    both = grouped_mean_estimate([small, large], 4000)
    assert both.value == pytest.approx((small.mean() + large.mean()) / 2)
    one, other = (mean_estimate(each, 4000) for each in (small, large))
    width = np.hypot(one.high - one.low, other.high - other.low) / 2
    assert both.high - both.low == pytest.approx(width, rel=0.08)
    assert grouped_mean_estimate([large], 500).value == mean_estimate(large, 500).value
    with pytest.raises(ValueError, match="no groups"):
        grouped_mean_estimate([])


def test_several_benchmarks_are_scored_apart_and_averaged(tmp_path: Path, data: list[Path]) -> None:
    """Each benchmark has its own figures, the average weighs them alike; none may be absent."""
    sets = read_math_sets(data)
    run = saved(
        tmp_path / "run.jsonl", {"amc23": set(range(20)), "aime25": set(range(6))}, samples=2
    )
    rows = [SavedCompletion(**json.loads(line)) for line in run.read_text().splitlines()]
    scores = score_sets(rows, sets, samples=200)
    assert {name: score.estimates["avg@2"].value for name, score in scores.items()} == {
        "amc23": 0.5,
        "aime25": 0.2,
    }
    assert average_estimates(scores, 200)["greedy pass@1"].value == pytest.approx(0.35)
    with pytest.raises(ValueError, match="no completion of aime25"):
        score_sets([row for row in rows if row.problem_id.startswith("amc23")], sets)


def test_a_difference_is_marked_only_when_its_paired_interval_excludes_zero(
    tmp_path: Path, data: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only paired intervals without 0 are marked.

    Twelve problems gained and none lost differ, although the runs' own intervals overlap. As many
    lost as gained do not. The average over benchmarks is compared as well.
    """
    base = {"amc23": set(range(14)), "aime25": set(range(6))}
    better = {"amc23": set(range(26)), "aime25": set(range(3, 9))}
    first, second = saved(tmp_path / "a.jsonl", better), saved(tmp_path / "b.jsonl", base)
    comparison = compare_completions(first, second, read_math_sets(data))
    rows = {(row.benchmark, row.name): row for row in comparison.differences}
    gained, moved, average = (
        rows[name, "greedy pass@1"] for name in ("amc23", "aime25", "average")
    )
    assert (
        gained.difference.value == pytest.approx(0.3)
        and gained.differs
        and gained.difference.low > 0
    )
    assert (moved.difference.value, moved.differs) == (0, False)
    assert average.difference.value == pytest.approx(0.15) and average.differs
    assert main(["evaluate", "compare", str(first), str(second), "--data", *map(str, data)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.endswith("*") for line in shown[1:4]] == [
        True,
        False,
        True,
    ] and "+0.300 [+0.1" in shown[1]


def test_avg_is_compared_whatever_its_k_and_other_numbers_with_their_equals(
    tmp_path: Path, data: list[Path]
) -> None:
    """avg@2 is compared with avg@4, pass@2 with itself; metrics of one run alone are named."""
    right = {"amc23": {1}, "aime25": {2}}
    first, second = (
        saved(tmp_path / f"{k}.jsonl", right, samples=k, greedy=k == 2) for k in (2, 4)
    )
    comparison = compare_completions(first, second, read_math_sets(data), samples=100)
    assert {row.name for row in comparison.differences} == {"avg@2 / avg@4", "pass@2", "maj@2"}
    assert comparison.only_first == ["greedy pass@1"] and comparison.only_second == [
        "maj@4",
        "pass@4",
    ]
    third = saved(tmp_path / "greedy.jsonl", right)
    with pytest.raises(ValueError, match="no metric in common"):
        compare_completions(second, third, read_math_sets(data))


def test_runs_on_different_problems_are_rejected_and_the_first_is_named(
    tmp_path: Path, data: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file and the problem, whichever file has it."""
    first = saved(tmp_path / "a.jsonl", {name: set() for name in SIZES})
    second = tmp_path / "b.jsonl"
    second.write_text(
        "".join(
            line for line in first.read_text().splitlines(keepends=True) if '"amc23-7"' not in line
        )
    )
    sets = read_math_sets(data)
    for a, b in ((first, second), (second, first)):
        with pytest.raises(
            DataFileError, match=rf"different problems: 'amc23-7' is only in {first}"
        ):
            compare_completions(a, b, sets)
    assert main(["evaluate", "compare", str(first), str(second), "--data", *map(str, data)]) == 2
    assert "'amc23-7' is only in" in capsys.readouterr().err


def test_the_command_evaluates_a_model_and_prints_how_to_score_it_again(
    tmp_path: Path,
    data: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--model prints a table and a command that prints the same table without a model.

    Every completion is saved. The engine is scripted: every third reply is correct.
    """
    engine = Scripted(
        lambda prompt, count: (
            f"\\boxed{{{prompt.split('?')[-2].split()[-1]}}}" if count == 1 else "no"
        )
    )
    monkeypatch.setattr(ServedModel, "load", lambda *arguments: ServedModel(engine, Bytes(), "id"))
    command = [
        "evaluate",
        "math",
        "--model",
        str(ASSETS / "generator"),
        "--k",
        "2",
        "--data",
        *map(str, data),
        "+experiment=toy",
        f"run.dir={tmp_path / 'run'}",
        "evaluation.samples_per_problem=2",
    ]
    assert main(command) == 0
    again, *table, last = capsys.readouterr().out.splitlines()
    assert (
        last.startswith("70 problems: sampled 0.500") and "greedy 0.000" in last and "avg@2" in last
    )
    words = again.partition("spark-nemo ")[2].split()
    assert len(Path(words[3]).read_text().splitlines()) == 3 * 70
    assert main([*words, "--k", "2"]) == 0 and capsys.readouterr().out.splitlines() == table
    assert (
        main([*command, "--k", "3"]) == 2
        and "evaluation.samples_per_problem is 2" in capsys.readouterr().err
    )
