"""How good labels are, measured against true step labels that the labelling never saw (evaluation
only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spark_nemo.records import LabelledSolution

from .bootstrap import DEFAULT_SAMPLES, Estimate, mean_estimate, ratio_estimate


@dataclass(frozen=True, slots=True)
class LabelQuality:
    """The accuracies are over the solutions that were *kept*, and None when none was.

    A method that drops hard solutions looks better by them, so read them together with
    ``share_kept``.
    """

    step_accuracy: Estimate | None
    first_error_accuracy: Estimate | None
    share_kept: float
    num_labelled: int
    num_solutions: int


def label_quality(
    labelled: Sequence[LabelledSolution],
    truths: Mapping[str, Sequence[bool]],
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> LabelQuality:
    """Compare labels with ``truths``: solution key to whether each step is truly correct.

    ``truths`` must cover every solution that was given to the labelling, the dropped ones too:
    their number is the denominator of ``share_kept``. First-error accuracy asks for the exact first
    wrong step, or for "none". Intervals resample solutions. Raises ``ValueError`` for a label
    without a truth, a step count that differs, and no truths.
    """
    if not truths:
        raise ValueError("label quality needs the true step labels of at least one solution")
    right_steps, num_steps, right_first = [], [], []
    for label in labelled:
        truth = truths.get(label.solution.key)
        if truth is None:
            raise ValueError(f"no true step labels for solution {label.solution.key}")
        if len(truth) != len(label.step_labels):
            raise ValueError(
                f"solution {label.solution.key}: {len(label.step_labels)} labelled steps, {len(truth)} true ones"
            )
        right_steps.append(sum(said == true for said, true in zip(label.step_labels, truth)))
        num_steps.append(len(truth))
        right_first.append(_first_error(label.step_labels) == _first_error(truth))
    return LabelQuality(
        step_accuracy=ratio_estimate(right_steps, num_steps, samples, seed) if labelled else None,
        first_error_accuracy=mean_estimate(right_first, samples, seed) if labelled else None,
        share_kept=len(labelled) / len(truths),
        num_labelled=len(labelled),
        num_solutions=len(truths),
    )


def _first_error(labels: Sequence[bool]) -> int:
    return next((k for k, correct in enumerate(labels) if not correct), -1)
