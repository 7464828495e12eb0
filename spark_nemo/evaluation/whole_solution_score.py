"""Score Yes/No verdicts about whole solutions on ProcessBench-format cases, as an ORM gives them.

This is *not* ProcessBench: no step is named, so a No counts for a solution with an error wherever
the error is, and guessing is right half of the time. The figures have names of their own and must
not be compared with a ProcessBench F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark_nemo.records import AnswerVerdict, VariantOutcome, Verdict

from .bootstrap import Hits


@dataclass(frozen=True, slots=True)
class WholeSolutionScore:
    """Fractions in [0, 1] of correct final verdicts.

    ``verdict_acc_error`` counts No for solutions with an error, ``verdict_acc_correct`` Yes for the
    others; guessing has a harmonic mean of 0.5. The ``num_unparsed`` cases without a verdict count
    as wrong.
    """

    verdict_acc_error: float
    verdict_acc_correct: float
    verdict_harmonic_mean: float
    num_error: int
    num_correct: int
    num_unparsed: int
    hits: Hits

    def as_json(self) -> dict[str, float]:
        """Return the figures for a file of results; ``hits`` follow from its verdicts."""
        return {
            "verdict_acc_error": self.verdict_acc_error,
            "verdict_acc_correct": self.verdict_acc_correct,
            "verdict_harmonic_mean": self.verdict_harmonic_mean,
            "num_error": self.num_error,
            "num_correct": self.num_correct,
            "num_unparsed": self.num_unparsed,
        }


def final_verdict(outcome: VariantOutcome) -> bool | None:
    """Return the final verdict of any kind of reward model; None for every kind of failure."""
    return outcome.answer_correct if isinstance(outcome, Verdict | AnswerVerdict) else None


def score_whole_solutions(
    labels: Sequence[int], verdicts: Sequence[bool | None]
) -> WholeSolutionScore:
    """Score verdicts on cases with ProcessBench labels: -1 for a solution without an error.

    Raises ``ValueError`` when the lengths differ, or when one kind of case is absent.
    """
    if len(labels) != len(verdicts):
        raise ValueError(f"{len(verdicts)} verdicts for {len(labels)} cases")
    pairs = list(zip(labels, verdicts))
    error = np.array([verdict is False for label, verdict in pairs if label != -1], bool)
    correct = np.array([verdict is True for label, verdict in pairs if label == -1], bool)
    if not len(error) or not len(correct):
        raise ValueError(
            f"{len(error)} cases with an error and {len(correct)} without: both kinds are needed"
        )
    acc_error = float(error.mean())
    acc_correct = float(correct.mean())
    total = acc_error + acc_correct
    return WholeSolutionScore(
        verdict_acc_error=acc_error,
        verdict_acc_correct=acc_correct,
        verdict_harmonic_mean=2 * acc_error * acc_correct / total if total else 0.0,
        num_error=len(error),
        num_correct=len(correct),
        num_unparsed=sum(verdict is None for verdict in verdicts),
        hits=Hits(error, correct),
    )
