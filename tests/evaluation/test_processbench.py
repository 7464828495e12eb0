"""ProcessBench: scoring against an independently written scorer, reading files, reading critics."""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_nemo.evaluation import (
    DataFileError,
    average_f1,
    predict_first_error,
    read_processbench,
    score_processbench,
)
from spark_nemo.evaluation.processbench import boxed_vote, majority_vote
from spark_nemo.records import ParseFailure, Truncated, Verdict

DATA = (
    Path(os.environ.get("SPARK_NEMO_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    / "processbench"
)

ROW = {
    "id": "gsm8k-0",
    "generator": "g",
    "problem": "1+1?",
    "steps": ["1+1=3", "so 3"],
    "final_answer_correct": False,
    "label": 0,
    "steps-merge": "ignored",
}


def naive_score(labels, predictions):
    """Written from the paper's definition, case by case, with no code of the package."""
    found, wrong_solutions, accepted, right_solutions = 0, 0, 0, 0
    for i in range(len(labels)):
        if labels[i] == -1:
            right_solutions += 1
            if predictions[i] is not None and predictions[i] == -1:
                accepted += 1
        else:
            wrong_solutions += 1
            if predictions[i] is not None and predictions[i] == labels[i]:
                found += 1
    a, b = found / wrong_solutions, accepted / right_solutions
    return a, b, 0.0 if a == 0 and b == 0 else 2 / (1 / a + 1 / b) if a and b else 0.0


@given(
    st.lists(
        st.tuples(st.integers(-1, 4), st.one_of(st.none(), st.integers(-2, 5))),
        min_size=2,
        max_size=40,
    )
)
@settings(max_examples=300, deadline=None)
def test_scoring_agrees_with_a_naive_scorer(pairs):
    """Random labels and predictions, with failures and indices out of range among them."""
    labels, predictions = [a for a, _ in pairs] + [-1, 0], [b for _, b in pairs] + [None, 3]
    score = score_processbench(labels, predictions)
    assert (score.acc_error, score.acc_correct, score.f1) == pytest.approx(
        naive_score(labels, predictions)
    )
    assert score.num_error + score.num_correct == len(labels)


@pytest.mark.parametrize(
    "predict, expected",
    [
        (lambda label: label, 1.0),
        (lambda label: -1, 0.0),
        (lambda label: 0, 0.0),
        (lambda label: None, 0.0),
        (lambda label: -1 if label == -1 else label + 1, 0.0),
        (lambda label: "-1" if label == -1 else label, 0.0),
    ],
)
def test_predictors_that_do_not_look_get_nothing(predict, expected):
    """Constant predictions, one step late, or a string for an index: F1 is 0."""
    labels = [-1] * 5 + [0, 1, 2, 3, 0]
    predictions = [predict(label) for label in labels]
    if expected == 0 and predictions[5] == 0 and predictions[0] == 0:
        assert score_processbench(labels, predictions).acc_error > 0
    assert score_processbench(labels, predictions).f1 == expected


def test_a_split_with_one_kind_of_case_has_no_f1():
    """Silently scoring it 0 or 1 would enter an average."""
    with pytest.raises(ValueError, match="needs both kinds"):
        score_processbench([-1, -1], [-1, -1])
    with pytest.raises(ValueError, match="1 predictions for 2"):
        score_processbench([-1, 0], [-1])


def test_the_overall_number_is_the_plain_mean_of_the_splits():
    """A split of two cases counts as much as one of two hundred."""
    small = score_processbench([-1, 0], [-1, 0])
    large = score_processbench([-1, 0] * 100, [-1, None] * 100)
    assert average_f1([small, large]) == 0.5
    assert large.num_unparsed == 100


def test_predictions_of_a_generative_prm():
    """A verdict predicts its first wrong step, 0-based; a failure predicts nothing."""
    assert predict_first_error(Verdict((True, False, True), False)) == 1
    assert predict_first_error(Verdict((True, True), True)) == -1
    assert predict_first_error(ParseFailure("x")) is None
    assert predict_first_error(Truncated(5)) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{2}", 2),
        (r"first \boxed{1}, no: \boxed{ -1 }", -1),
        (r"\boxed{2} then \boxed{none}", None),
        (r"\boxed{1.0}", None),
        (r"\boxed{\text{paragraph_2}}", None),
        ("the answer is 2", None),
        (r"\boxed{" + "9" * 5000 + "}", None),
        ("", None),
    ],
)
def test_the_last_box_of_a_critic_wins_and_must_hold_an_integer(text, expected):
    """As in the official code."""
    assert majority_vote([boxed_vote(text)]) == expected


def test_majority_over_critics():
    """Strings vote, the first seen wins a tie, and a word that wins is not a prediction."""
    assert majority_vote(["2", None, "0", "0"]) == 0
    assert majority_vote(["2", "0"]) == 2
    assert majority_vote(["01", "1", "01"]) == 1
    assert majority_vote(["x", "x", "1"]) is None
    assert majority_vote([None]) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": None}, "'label' is None"),
        ({"label": True}, "'label' is True"),
        ({"label": 2}, "'label' is 2, but must be in -1..1"),
        ({"label": -2}, "'label' is -2"),
        ({"steps": []}, "'steps' must be a non-empty list"),
        ({"steps": ["a", 3]}, "'steps' must be a non-empty list of strings"),
        ({"steps": "a"}, "'steps' is 'a'"),
        ({"final_answer_correct": 1}, "'final_answer_correct' is 1"),
        ({"problem": " "}, "'problem' is blank"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_malformed_row_is_named(tmp_path, change, message, suffix):
    """File, row and field are in the message, whichever of the two file formats it is."""
    path = tmp_path / f"split{suffix}"
    rows = [ROW, {**ROW, "id": "gsm8k-1", **change}]
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataFileError) as caught:
        read_processbench(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) and " 2: " in str(caught.value)


@pytest.mark.parametrize(
    "field", ["id", "generator", "problem", "steps", "final_answer_correct", "label"]
)
def test_a_missing_field_is_named(tmp_path, field):
    """Each of the six official fields is required."""
    path = tmp_path / "split.json"
    path.write_text(json.dumps([{key: value for key, value in ROW.items() if key != field}]))
    with pytest.raises(DataFileError, match=f"row 1: field '{field}' is missing"):
        read_processbench(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "has no rows"),
        ("{}", "must hold a JSON list"),
        ("[1]", "row 1: must be a JSON object"),
        ("[{", "not valid JSON"),
        (json.dumps([ROW, ROW]), "repeats 'gsm8k-0'"),
        ("[" * 100_000, "not valid JSON"),
        ("[1" + "0" * 5000 + "]", "not valid JSON"),
    ],
)
def test_a_file_that_is_not_a_split_is_rejected(tmp_path, text, message):
    """Broken, empty, of another shape, or with a case twice (which would count twice)."""
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(DataFileError, match=message):
        read_processbench(path)
    with pytest.raises(DataFileError, match="cannot be read"):
        read_processbench(tmp_path / "absent.json")
    if message == "not valid JSON":
        (tmp_path / "split.jsonl").write_text(f"{json.dumps(ROW)}\n{text}\n")
        with pytest.raises(DataFileError, match=r"split\.jsonl:line 2: not valid JSON"):
            read_processbench(tmp_path / "split.jsonl")


@pytest.mark.parametrize("split, num_error, num_correct", [("gsm8k", 207, 193), ("math", 594, 406)])
def test_the_official_splits_load_and_score(split, num_error, num_correct):
    """Case counts are the published ones, a perfect predictor gets 1, guesses score as naively."""
    path = DATA / f"{split}.json"
    if not path.exists():
        pytest.skip(f"{path} is not here: set SPARK_NEMO_DATA")
    labels = [case.label for case in read_processbench(path)]
    perfect = score_processbench(labels, labels)
    assert (perfect.num_error, perfect.num_correct, perfect.f1) == (num_error, num_correct, 1.0)
    rng = random.Random(0)
    guesses = [rng.choice([None, -1, 0, 1, 2, label]) for label in labels]
    score = score_processbench(labels, guesses)
    assert (score.acc_error, score.acc_correct, score.f1) == pytest.approx(
        naive_score(labels, guesses)
    )


@pytest.mark.parametrize("field", ["id", "problem"])
def test_half_a_surrogate_pair_is_rejected_when_the_file_is_read(tmp_path, field):
    """No tokenizer can encode it: an evaluation would fail after all cases before this one."""
    path = tmp_path / "split.json"
    path.write_text(json.dumps([{**ROW, field: "a \ud800"}]))
    with pytest.raises(
        DataFileError, match=f"row 1: field '{field}' holds half of a surrogate pair"
    ):
        read_processbench(path)
