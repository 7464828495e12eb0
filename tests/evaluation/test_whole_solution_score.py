"""Scores of verdicts on whole solutions, as an ORM gives them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_nemo.evaluation.processbench import predict_first_error, score_processbench
from spark_nemo.evaluation.whole_solution_score import final_verdict, score_whole_solutions
from spark_nemo.records import AnswerVerdict, ParseFailure, Truncated, Verdict

LABELS = [2, 0, -1, -1, -1]


def test_golden_score() -> None:
    """No for one of two errors and Yes for two of three correct solutions: 1/2, 2/3, mean 4/7."""
    score = score_whole_solutions(LABELS, [False, True, True, True, None])
    assert (score.verdict_acc_error, score.verdict_acc_correct, score.num_unparsed) == (
        0.5,
        pytest.approx(2 / 3),
        1,
    )
    assert score.verdict_harmonic_mean == pytest.approx(4 / 7)


def test_a_constant_judge_scores_zero() -> None:
    """Always Yes or always No is right about one kind of case alone; so is a judge that never
    answers.
    """
    for said in (True, False, None):
        assert score_whole_solutions(LABELS, [said] * 5).verdict_harmonic_mean == 0.0


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=20))
def test_it_is_never_below_the_processbench_score_of_the_same_predictions(rows) -> None:
    """Naming the step is harder than saying that there is an error: the two numbers must not be
    compared.
    """
    labels, predictions = [-1, 0, *(r[0] for r in rows)], [-1, 0, *(r[1] for r in rows)]
    whole = score_whole_solutions(labels, [p == -1 for p in predictions])
    assert whole.verdict_harmonic_mean >= score_processbench(labels, predictions).f1 - 1e-12


def test_an_orms_verdict_is_no_prediction_of_a_step() -> None:
    """An ORM's verdict is not even a wrong prediction: it would become a ProcessBench score."""
    with pytest.raises(ValueError, match="names no step"):
        predict_first_error(AnswerVerdict(True))
    outcomes = [AnswerVerdict(True), Verdict((True,), False), ParseFailure("x"), Truncated(3)]
    assert [final_verdict(outcome) for outcome in outcomes] == [True, False, None, None]


@pytest.mark.parametrize(
    ("labels", "verdicts", "message"),
    [
        ([-1, -1], [True, True], "both kinds"),
        ([0], [False], "both kinds"),
        ([0, -1], [True], "1 verdicts for 2"),
    ],
)
def test_what_has_no_score_is_an_error(labels, verdicts, message: str) -> None:
    """One kind of case only, or another number of verdicts than of cases."""
    with pytest.raises(ValueError, match=message):
        score_whole_solutions(labels, verdicts)
