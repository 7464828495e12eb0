"""Rewards of a whole response that count its correct steps. Source: arXiv 2512.03244, its
step-level rewards.

In all of them k of the n steps were judged correct, y is the final verdict and f the format gate.
None of them resists step inflation: splitting a correct step in two gives (k + 1) / (n + 1), which
is more than k / n while any step is wrong. Process-aware ``f * y`` has no steps in it and is the
design that resists.
"""

from __future__ import annotations

from collections.abc import Callable

from spark_nemo.records import AnswerVerdict, Failure, FormatViolation, VariantOutcome, Verdict

STEP_WEIGHT, VERDICT_WEIGHT = 0.4, 0.6
"""Of the step-augmented reward."""


def step_average_reward(
    format_violation: FormatViolation | None, outcome: VariantOutcome | None
) -> float | Failure:
    """``r = k / n``. The paper has no format gate here; a response that is not in the format has no
    steps to be judged, so it is worth 0 in this package, and a final verdict never stands in for
    missing labels: an ORM's raises ``ValueError``.

    Does *not* resist inflation: splitting a correct step in two raises the reward (and so the total
    advantage) whenever a step is wrong. Failures and errors are those of ``process_aware_reward``.
    """
    return _gated(format_violation, outcome, correct_share)


def step_augmented_reward(
    format_violation: FormatViolation | None, outcome: VariantOutcome | None
) -> float | Failure:
    """``r = f * (0.4 * k / n + 0.6 * y)``; for labels C, I, C, C and verdict Yes it is 0.9.

    Does *not* resist inflation: splitting a correct step in two raises the reward (and so the total
    advantage) whenever a step is wrong, by 0.4 times what it does to the step average. Failures and
    errors are those of ``process_aware_reward``.
    """
    return _gated(
        format_violation,
        outcome,
        lambda verdict: (
            STEP_WEIGHT * correct_share(verdict) + VERDICT_WEIGHT * verdict.answer_correct
        ),
    )


def correct_share(verdict: Verdict) -> float:
    """``k / n``; a verdict has at least one step."""
    return sum(verdict.step_labels) / len(verdict.step_labels)


def _gated(
    format_violation: FormatViolation | None,
    outcome: VariantOutcome | None,
    score: Callable[[Verdict], float],
) -> float | Failure:
    if isinstance(outcome, AnswerVerdict):
        raise ValueError(
            "an ORM's verdict has no step labels: a reward that counts steps cannot be made of it"
        )
    if format_violation is not None or isinstance(outcome, FormatViolation):
        return 0.0
    if outcome is None:
        raise ValueError("a response in the format needs an outcome; it was not verified")
    return score(outcome) if isinstance(outcome, Verdict) else outcome
