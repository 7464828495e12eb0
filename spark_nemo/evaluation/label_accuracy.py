"""Accuracy of labels against true step labels, which the labelling itself never sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spark_nemo.records import LabelledSolution

from .bootstrap import DEFAULT_SAMPLES, Estimate, mean_estimate, ratio_estimate


@dataclass(frozen=True, slots=True)
class LabelQuality:
    """Accuracies over the solutions that a method *kept*, None when it kept none.

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
    """Compare labels with ``truths``: by solution key, whether each step is truly correct.

    ``truths`` must cover every solution that the labelling was given, dropped ones included: their
    number is the denominator of ``share_kept``. First-error accuracy counts exact matches of the
    first wrong step, or of "none". Intervals resample solutions. Raises ``ValueError`` for a label
    without a truth, a different number of steps, or no truths.
    """
    if not truths:
        raise ValueError("label quality needs the true step labels of at least one solution")
    correct_steps = []
    num_steps = []
    correct_first_errors = []
    for label in labelled:
        truth = truths.get(label.solution.key)
        if truth is None:
            raise ValueError(f"no true step labels for solution {label.solution.key}")
        if len(truth) != len(label.step_labels):
            raise ValueError(
                f"solution {label.solution.key}: {len(label.step_labels)} labelled steps, "
                f"{len(truth)} true ones"
            )
        matches = [given == true for given, true in zip(label.step_labels, truth)]
        correct_steps.append(sum(matches))
        num_steps.append(len(truth))
        correct_first_errors.append(_first_error(label.step_labels) == _first_error(truth))
    step_accuracy = None
    first_error_accuracy = None
    if labelled:
        step_accuracy = ratio_estimate(correct_steps, num_steps, samples, seed)
        first_error_accuracy = mean_estimate(correct_first_errors, samples, seed)
    return LabelQuality(
        step_accuracy=step_accuracy,
        first_error_accuracy=first_error_accuracy,
        share_kept=len(labelled) / len(truths),
        num_labelled=len(labelled),
        num_solutions=len(truths),
    )


def _first_error(labels: Sequence[bool]) -> int:
    return next((k for k, correct in enumerate(labels) if not correct), -1)
