"""ProcessBench (arXiv 2412.06559): name the first wrong step of a solution, or none.

Format, scoring and the parsing of a critic's ``\\boxed{}`` follow the official code
(QwenLM/ProcessBench, commit e802463), quirks included where two readings are possible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spark_nemo.records import AnswerVerdict, VariantOutcome, Verdict
from spark_nemo.records.rows import DataFileError

from .bootstrap import Hits
from .data_rows import read_rows, required, required_text

_BOX = "\\boxed{"


@dataclass(frozen=True, slots=True)
class ProcessBenchCase:
    """One solution; ``label`` is the 0-based index of its first wrong step, -1 without one."""

    case_id: str
    generator: str
    problem: str
    steps: tuple[str, ...]
    final_answer_correct: bool
    label: int


@dataclass(frozen=True, slots=True)
class ProcessBenchScore:
    """Fractions in [0, 1]; ``acc_error`` is over cases with an error, ``acc_correct`` without."""

    acc_error: float
    acc_correct: float
    f1: float
    num_error: int
    num_correct: int
    num_unparsed: int
    hits: Hits

    def as_json(self) -> dict[str, float]:
        """Return the figures for a file of results; ``hits`` follow from its predictions."""
        return {
            "acc_error": self.acc_error,
            "acc_correct": self.acc_correct,
            "f1": self.f1,
            "num_error": self.num_error,
            "num_correct": self.num_correct,
            "num_unparsed": self.num_unparsed,
        }


def read_processbench(path: str | Path) -> list[ProcessBenchCase]:
    """Read an official split; fields beyond the official six are ignored.

    Raises ``DataFileError`` that names the file, the row and the field of the first malformed row.
    """
    cases = [_read_case(place, row) for place, row in read_rows(path)]
    counts = Counter(case.case_id for case in cases)
    repeated = [case_id for case_id, count in counts.items() if count > 1]
    if repeated:
        raise DataFileError(f"{path}: field 'id' repeats {repeated[0]!r}: ids must be unique")
    return cases


def score_processbench(
    labels: Sequence[int], predictions: Sequence[int | None]
) -> ProcessBenchScore:
    """Score exact predictions of the first wrong step; None (unparsed) is wrong.

    ``f1`` is the harmonic mean of the two accuracies, and 0 when both are 0, where the official
    code divides by zero. Raises ``ValueError`` when the lengths differ, or when one kind of case is
    absent: such a split does not have an F1.
    """
    if len(labels) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} ProcessBench cases")
    error = np.array(
        [prediction == label for label, prediction in zip(labels, predictions) if label != -1], bool
    )
    correct = np.array(
        [prediction == label for label, prediction in zip(labels, predictions) if label == -1], bool
    )
    if not len(error) or not len(correct):
        raise ValueError(
            f"{len(error)} cases with an error and {len(correct)} without: F1 needs both kinds"
        )
    acc_error = float(error.mean())
    acc_correct = float(correct.mean())
    total = acc_error + acc_correct
    return ProcessBenchScore(
        acc_error=acc_error,
        acc_correct=acc_correct,
        f1=2 * acc_error * acc_correct / total if total else 0.0,
        num_error=len(error),
        num_correct=len(correct),
        num_unparsed=sum(prediction is None for prediction in predictions),
        hits=Hits(error, correct),
    )


def average_f1(scores: Iterable[ProcessBenchScore]) -> float:
    """Return the overall number: the plain mean of the splits' F1, whatever their sizes."""
    values = [score.f1 for score in scores]
    if not values:
        raise ValueError("average F1 of no splits")
    return sum(values) / len(values)


def predict_first_error(outcome: VariantOutcome) -> int | None:
    """Return the first wrong step of a generative PRM's verdict; None for every kind of failure.

    Raises ``ValueError`` for an ORM's verdict, which names no step.
    """
    if isinstance(outcome, AnswerVerdict):
        raise ValueError("an ORM's verdict names no step, so it has no ProcessBench score")
    return outcome.first_error if isinstance(outcome, Verdict) else None


def majority_vote(votes: Iterable[str | None]) -> int | None:
    """Return the majority of several critics' boxes as an integer, as in the official code.

    Votes are *strings* (``1`` and ``01`` differ, words vote too), and the string seen first wins a
    tie. None does not vote. The result is None when the winning string is not an integer.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return None
    winner = counts.most_common(1)[0][0]
    try:
        return int(winner)
    except ValueError:
        return None


def boxed_vote(text: str) -> str | None:
    r"""Return the stripped content of a critic's last box; None without a box.

    The official pattern is ``\\boxed\{([^}]*)\}``: a box ends at the first closing brace, and no
    box begins inside another.
    """
    # One pass: the pattern takes minutes on a megabyte of boxes that never close.
    content = None
    start = text.find(_BOX)
    while start >= 0:
        end = text.find("}", start)
        if end < 0:
            break
        content = text[start + len(_BOX) : end]
        start = text.find(_BOX, end)
    return None if content is None else content.strip()


def _read_case(place: str, row: dict[str, object]) -> ProcessBenchCase:
    steps = required(place, row, "steps", list, "a list of step texts")
    if not steps or not all(isinstance(step, str) for step in steps):
        raise DataFileError(f"{place}: field 'steps' must be a non-empty list of strings")
    label = required(place, row, "label", int, "the 0-based index of the first wrong step, or -1")
    if not -1 <= label < len(steps):
        raise DataFileError(
            f"{place}: field 'label' is {label}, but must be in -1..{len(steps) - 1} ('steps')"
        )
    return ProcessBenchCase(
        case_id=required_text(place, row, "id", "a string such as gsm8k-0"),
        generator=required(
            place, row, "generator", str, "the name of the model that wrote the steps"
        ),
        problem=required_text(place, row, "problem", "the question's text"),
        steps=tuple(steps),
        final_answer_correct=required(place, row, "final_answer_correct", bool, "true or false"),
        label=label,
    )
