"""Rewards that count steps: golden values, and the effect of splitting a step."""

from __future__ import annotations

import pytest

from spark_nemo.records import AnswerVerdict, FormatViolation, ParseFailure, Verdict
from spark_nemo.rewards import process_aware_reward, step_augmented_reward, step_average_reward
from spark_nemo.rewards.designs import overlong_penalty

CICC = Verdict((True, False, True, True), True)
SPLIT = Verdict((True, True, False, True, True), True)
"""The same response with its first step split in two."""
BROKEN = FormatViolation("two boxes")
ALL = (process_aware_reward, step_average_reward, step_augmented_reward)


def test_golden_values_of_the_spec() -> None:
    """Four steps C, I, C, C with a Yes: 1, 0.75 and 0.9; with a No: 0, 0.75 and 0.3."""
    assert [reward(None, CICC) for reward in ALL] == pytest.approx([1.0, 0.75, 0.9])
    no = Verdict(CICC.step_labels, False)
    assert [reward(None, no) for reward in ALL] == pytest.approx([0.0, 0.75, 0.3])


def test_splitting_a_correct_step_pays_where_the_docstring_says_so() -> None:
    """Process-aware does not change; the two that count steps do. With every step correct none
    changes.
    """
    change = [reward(None, SPLIT) - reward(None, CICC) for reward in ALL]
    assert change == pytest.approx([0.0, 4 / 5 - 3 / 4, 0.4 * (4 / 5 - 3 / 4)])
    perfect = [reward(None, Verdict((True,) * n, True)) for reward in ALL for n in (2, 3)]
    assert perfect == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("reward", ALL)
def test_a_failure_is_no_score_and_a_broken_format_is_zero(reward) -> None:
    """A parse failure is returned as it is, only the gate gives 0, and an unverified response is an
    error.
    """
    failure = ParseFailure("verdict_missing")
    assert reward(None, failure) is failure
    assert reward(BROKEN, None) == reward(None, BROKEN) == reward(BROKEN, CICC) == 0.0
    with pytest.raises(ValueError, match="not verified"):
        reward(None, None)


@pytest.mark.parametrize("answer", [True, False])
def test_an_orms_verdict_is_worth_its_answer_and_nothing_that_counts_steps(answer: bool) -> None:
    """A design that counts steps raises instead of scoring missing labels as 0, also for a format
    violation.
    """
    verdict = AnswerVerdict(answer)
    assert not hasattr(verdict, "step_labels")
    assert process_aware_reward(None, verdict) == float(answer)
    assert process_aware_reward(BROKEN, verdict) == 0.0
    for reward in (step_average_reward, step_augmented_reward):
        for violation in (None, BROKEN):
            with pytest.raises(ValueError, match="no step labels"):
                reward(violation, verdict)


def test_overlong_penalty_is_zero_then_a_line_then_minus_one() -> None:
    """DAPO's values for a limit of 20 and a buffer of 4; a buffer above the limit is an error."""
    assert [overlong_penalty(n, 20, 4) for n in (0, 16, 17, 18, 20, 25)] == [
        0,
        0,
        -0.25,
        -0.5,
        -1,
        -1,
    ]
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(5, 20, 21)
