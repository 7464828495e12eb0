"""Several votes on one response: golden cases and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_nemo.records import (
    AnswerVerdict,
    EngineError,
    ParseFailure,
    Truncated,
    Verdict,
    count_votes,
)
from spark_nemo.rewards.judge import aggregate_votes

T, F = True, False
LOST, CUT, GONE = ParseFailure("verdict_missing"), Truncated(9), EngineError("gone")
verdicts = st.builds(Verdict, st.tuples(st.booleans(), st.booleans(), st.booleans()), st.booleans())
outcomes = st.one_of(verdicts, st.sampled_from([LOST, CUT, GONE]))


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([Verdict((T, F), T)], Verdict((T, F), T)),
        ([Verdict((T, T), T), Verdict((T, F), F), Verdict((F, F), T)], Verdict((T, F), T)),
        ([Verdict((T, F), F), LOST, Verdict((T, F), F)], Verdict((T, F), F)),
        ([Verdict((T, T), T), Verdict((T, F), F)], Verdict((T, F), F)),
        ([Verdict((T, T), T), Verdict((T, T), F), Verdict((T, T), F)], Verdict((T, T), F)),
    ],
)
def test_golden_votes(votes, expected) -> None:
    """One vote, a plain majority, a failed vote, a tie (against the response), and a verdict that
    contradicts its own labels.
    """
    assert aggregate_votes(votes, 1) == expected


YES, NO = AnswerVerdict(True), AnswerVerdict(False)


@pytest.mark.parametrize(
    ("votes", "minimum", "expected"),
    [
        ([YES], 1, YES),
        ([YES, NO, YES], 2, YES),
        ([YES, NO], 1, NO),
        ([YES, LOST, GONE], 1, YES),
        ([YES, LOST, LOST], 2, LOST),
    ],
)
def test_an_orms_votes_are_counted_on_the_answer(votes, minimum: int, expected) -> None:
    """A tie is a No, failures do not vote, and too few verdicts are a failure, as with steps."""
    assert aggregate_votes(votes, minimum) == expected


def test_verdicts_with_and_without_steps_are_not_one_vote() -> None:
    """Verdicts of two kinds of reward model must not be mixed; an ORM's verdict never makes a label
    of stage I.
    """
    with pytest.raises(ValueError, match="no step labels"):
        aggregate_votes([YES, Verdict((T,), T)], 1)
    with pytest.raises(ValueError, match="no step labels"):
        count_votes([YES, YES])


@pytest.mark.parametrize(
    ("votes", "minimum", "expected"),
    [
        ([LOST, CUT, CUT], 1, CUT),
        ([LOST, CUT], 1, LOST),
        ([GONE], 1, GONE),
        ([Verdict((T,), T), LOST, CUT], 2, LOST),
    ],
)
def test_too_few_verdicts_are_a_failure(votes, minimum: int, expected) -> None:
    """The most common kind, the first on a tie; a single Yes among failures is not a Yes."""
    assert aggregate_votes(votes, minimum) is expected


@given(
    st.lists(outcomes, min_size=1, max_size=7), st.integers(1, 7), st.randoms(use_true_random=False)
)
def test_order_and_failures_do_not_vote(votes, minimum: int, random) -> None:
    """The verdict does not depend on the order of votes, nor on failures while enough verdicts are
    left. A verdict is returned exactly if there are enough.
    """
    minimum = min(minimum, len(votes))
    result = aggregate_votes(votes, minimum)
    assert isinstance(result, Verdict) == (sum(isinstance(v, Verdict) for v in votes) >= minimum)
    shuffled = random.sample(votes, len(votes))
    if isinstance(result, Verdict):
        assert (
            aggregate_votes(shuffled, minimum)
            == result
            == aggregate_votes([*votes, LOST, CUT], minimum)
        )


@given(st.lists(verdicts, min_size=1, max_size=6), st.data())
def test_a_vote_in_favour_never_hurts(votes, data) -> None:
    """Changing one label or verdict of one vote to True changes nothing to False."""
    before, k = aggregate_votes(votes, 1), data.draw(st.integers(0, len(votes) - 1))
    place = data.draw(st.integers(0, 3))
    labels = tuple(label or i == place for i, label in enumerate(votes[k].step_labels))
    after = aggregate_votes(
        [*votes[:k], Verdict(labels, votes[k].answer_correct or place == 3), *votes[k + 1 :]], 1
    )
    assert all(
        a >= b
        for a, b in zip(
            (*after.step_labels, after.answer_correct), (*before.step_labels, before.answer_correct)
        )
    )


@pytest.mark.parametrize("minimum", [0, 3])
def test_a_minimum_that_cannot_be_met_is_a_bug(minimum: int) -> None:
    """It raises instead of failing every response."""
    with pytest.raises(ValueError, match="min_votes"):
        aggregate_votes([LOST, CUT], minimum)
