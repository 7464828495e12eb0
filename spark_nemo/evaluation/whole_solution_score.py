"""Yes or No about a whole solution, on ProcessBench-format cases: what an ORM can be scored on.

This is *not* ProcessBench: no step is named, so a No counts for a solution with an error wherever
the error is, and guessing is right half of the time. Its figures have names of their own and are
never put beside a ProcessBench F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark_nemo.records import AnswerVerdict, VariantOutcome, Verdict

from .bootstrap import Hits


@dataclass(frozen=True, slots=True)
class WholeSolutionScore:
    """Fractions in [0, 1]: how often a solution with an error got a No, how often one without got a
    Yes, and their harmonic mean (0 when both are 0; 0.5 for a coin). ``num_unparsed`` cases without
    a verdict count as wrong.
    """

    verdict_acc_error: float
    verdict_acc_correct: float
    verdict_harmonic_mean: float
    num_error: int
    num_correct: int
    num_unparsed: int
    hits: Hits


def final_verdict(outcome: VariantOutcome) -> bool | None:
    """The final verdict of any kind of reward model; None for every kind of failure."""
    return outcome.answer_correct if isinstance(outcome, Verdict | AnswerVerdict) else None


def score_whole_solutions(
    labels: Sequence[int], verdicts: Sequence[bool | None]
) -> WholeSolutionScore:
    """Score verdicts on cases whose ``labels`` are ProcessBench's: -1 for a solution without an
    error.

    Raises ``ValueError`` when the lengths differ, or when one kind of case is absent.
    """
    if len(labels) != len(verdicts):
        raise ValueError(f"{len(verdicts)} verdicts for {len(labels)} cases")
    error = np.array([said is False for label, said in zip(labels, verdicts) if label != -1], bool)
    correct = np.array([said is True for label, said in zip(labels, verdicts) if label == -1], bool)
    if not len(error) or not len(correct):
        raise ValueError(
            f"{len(error)} cases with an error and {len(correct)} without: both kinds are needed"
        )
    acc_error, acc_correct = float(error.mean()), float(correct.mean())
    total = acc_error + acc_correct
    return WholeSolutionScore(
        verdict_acc_error=acc_error,
        verdict_acc_correct=acc_correct,
        verdict_harmonic_mean=2 * acc_error * acc_correct / total if total else 0.0,
        num_error=len(error),
        num_correct=len(correct),
        num_unparsed=sum(said is None for said in verdicts),
        hits=Hits(error, correct),
    )
