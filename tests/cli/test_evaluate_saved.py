"""Scoring saved outputs, from the library and from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spark_nemo.cli.main import main
from spark_nemo.evaluation import DataFileError
from spark_nemo.evaluation.bootstrap import DEFAULT_SAMPLES
from spark_nemo.evaluation.math_data import read_math
from spark_nemo.evaluation.saved_completions import (
    SavedCompletion,
    read_completions,
    score_completions,
    write_completions,
)
from spark_nemo.evaluation.saved_predictions import score_saved_predictions


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bench(tmp_path: Path) -> list[Path]:
    rows = {
        name: [
            {
                "id": f"{name}-{i}",
                "generator": "g",
                "problem": "1+1?",
                "steps": ["a", "b"],
                "final_answer_correct": label == -1,
                "label": label,
            }
            for i, label in enumerate(labels)
        ]
        for name, labels in (("first", [-1, 0, 1, -1]), ("second", [1, -1]))
    }
    return [lines(tmp_path / f"{name}.jsonl", split) for name, split in rows.items()]


def said(folder: Path, name: str, predictions: list[int | str | None]) -> Path:
    ids = [f"first-{i}" for i in range(4)] + [f"second-{i}" for i in range(2)]
    return lines(
        folder / f"{name}.jsonl",
        [
            {"id": i, **({"generated_critique": p} if isinstance(p, str) else {"prediction": p})}
            for i, p in zip(ids, predictions)
        ],
    )


def test_saved_predictions_are_scored_by_split_and_files_vote(
    tmp_path: Path, bench: list[Path]
) -> None:
    """Proves the average is over splits, None never votes, the first file wins a tie, and texts
    count like numbers.
    """
    files = [
        said(tmp_path, "a", [-1, 0, 0, 0, 1, -1]),
        said(tmp_path, "b", [-1, "\\boxed{1}", 1, -1, None, -1]),
        said(tmp_path, "c", [None, 0, 1, None, 1, "\\boxed{}"]),
    ]
    one, three = score_saved_predictions(files[:1], bench), score_saved_predictions(files, bench)
    assert one.splits["first"].f1 == pytest.approx(0.5) and one.average == pytest.approx(0.75)
    assert (
        three.votes == 3
        and three.splits["first"].acc_error == 1.0
        and three.splits["first"].acc_correct == 0.5
    )


def test_the_command_prints_every_split_and_the_average(
    tmp_path: Path, bench: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves the command line needs no configuration and no model."""
    path = said(tmp_path, "a", [-1, 0, 0, 0, 1, -1])
    assert (
        main(["evaluate", "processbench", "--predictions", str(path), "--data", *map(str, bench)])
        == 0
    )
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].split() == ["first", "50.0", "50.0", "50.0", "4", "0"]
    assert "average F1 75.0" in shown


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "third-0", "prediction": 0}, "line 7: field 'id' is 'third-0'"),
        ({"id": "first-0", "prediction": 0}, "line 7: field 'id' repeats 'first-0'"),
        ({"id": "first-0"}, "line 7"),
        ({"id": "first-0", "prediction": True}, "line 7"),
    ],
)
def test_a_bad_prediction_row_is_named(
    tmp_path: Path, bench: list[Path], row: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2 with file, line and field; a case without a prediction is an error."""
    path = said(tmp_path, "a", [0] * 6)
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    command = ["evaluate", "processbench", "--data", *map(str, bench), "--predictions", str(path)]
    assert main(command) == 2 and message in capsys.readouterr().err
    path.write_text("\n".join(path.read_text().splitlines()[:5]) + "\n")
    assert main(command) == 2 and "case 'second-1' has 0 predictions" in capsys.readouterr().err


def test_saved_completions_are_scored_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves greedy, avg@k, pass@k and maj@k of a table worked out by hand, from the library and
    the command line.
    """
    data = lines(
        tmp_path / "amc23.jsonl", [{"id": i, "problem": "?", "answer": float(i)} for i in range(2)]
    )
    texts = {0: ["0", "0", "5", "5"], 1: ["1", "2", "1", "1"]}
    rows = [
        SavedCompletion(f"amc23-{i}", k, False, f"so \\boxed{{{t}}}")
        for i, told in texts.items()
        for k, t in enumerate(told)
    ]
    rows += [
        SavedCompletion("amc23-0", 0, True, "\\boxed{0.0}"),
        SavedCompletion("amc23-1", 0, True, "no box"),
    ]
    path = tmp_path / "completions.jsonl"
    write_completions(path, rows)
    assert read_completions(path) == rows
    score = score_completions(rows, read_math(data), samples=DEFAULT_SAMPLES)
    values = {name: estimate.value for name, estimate in score.estimates.items()}
    assert values == pytest.approx(
        {
            "greedy pass@1": 0.5,
            "avg@4": 0.625,
            "pass@2": (5 / 6 + 1) / 2,
            "maj@2": 1.0,
            "pass@4": 1.0,
            "maj@4": 1.0,
        }
    )
    assert (
        main(["evaluate", "math", "--predictions", str(path), "--data", str(data), "--k", "4"]) == 0
    )
    shown = capsys.readouterr().out
    assert "avg@4         0.625 [" in shown and "pass@2" not in shown
    assert (
        main(["evaluate", "math", "--predictions", str(path), "--data", str(data), "--k", "9"]) == 2
    )
    assert "pass@9" in capsys.readouterr().err


def test_a_problem_without_completions_is_an_error(tmp_path: Path) -> None:
    """A problem without a completion is an error, and so is a completion of a foreign problem."""
    problems = read_math(
        lines(
            tmp_path / "amc23.jsonl", [{"id": i, "problem": "?", "answer": 1.0} for i in range(2)]
        )
    )
    with pytest.raises(ValueError, match="'amc23-1' has no sampled completion"):
        score_completions([SavedCompletion("amc23-0", 0, False, "")], problems)
    with pytest.raises(ValueError, match="'x', which is not in the data"):
        score_completions([SavedCompletion("x", 0, False, "")], problems)


def test_overrides_and_predictions_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that the command would not read is an error."""
    assert main(["evaluate", "math", "+experiment=toy", "--predictions", "a", "--data", "b"]) == 2
    assert "+experiment=toy has no effect" in capsys.readouterr().err
    assert main(["evaluate", "math", "--predictions", "a"]) == 2
    assert "--data" in capsys.readouterr().err


def test_the_file_of_a_model_driven_run_is_scored_again(tmp_path: Path, bench: list[Path]) -> None:
    """Proves what ``score_prm`` saves (an object with ``cases``) is read back, its own
    fields ignored.
    """
    path = tmp_path / "processbench.json"
    rows = [
        {"id": f"first-{i}", "label": 9, "prediction": p, "text": "Step 1: Correct"}
        for i, p in enumerate([-1, 0, 0, None])
    ]
    path.write_text(json.dumps({"f1": 0.9, "cases": rows}))
    score = score_saved_predictions([path], bench[:1])
    assert score.average == pytest.approx(0.5) and score.splits["first"].num_unparsed == 1
    path.write_text(json.dumps({"f1": 0.9}))
    with pytest.raises(DataFileError, match="must hold a JSON list"):
        score_saved_predictions([path], bench[:1])


DATA = (
    Path(os.environ.get("SPARK_NEMO_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    / "processbench"
)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no ProcessBench files in {DATA}")
def test_the_two_files_at_hand_score_saved_votes(tmp_path: Path) -> None:
    """Proves both real splits with three critics: two right ones outvote a third, and a tie goes to
    the first file.
    """
    data = [DATA / "gsm8k.json", DATA / "math.json"]
    labels = {row["id"]: row["label"] for path in data for row in json.loads(path.read_text())}
    right = lines(
        tmp_path / "right.jsonl",
        [
            {"id": i, "generated_critique": f"The answer is \\boxed{{{label}}}."}
            for i, label in labels.items()
        ],
    )
    again = lines(
        tmp_path / "again.jsonl", [{"id": i, "prediction": label} for i, label in labels.items()]
    )
    wrong = lines(
        tmp_path / "wrong.jsonl",
        [{"id": i, "prediction": label + 1} for i, label in labels.items()],
    )
    score = score_saved_predictions([wrong, right, again], data)
    assert (
        score.average == 1.0
        and score.splits["gsm8k"].num_error == 207
        and score.splits["math"].num_correct == 406
    )
    assert score_saved_predictions([wrong, right], data).average == 0.0
