"""ProcessBench (arXiv 2412.06559): find the first wrong step of a solution, or say that there is
none.

The format, the scoring and the reading of a critic's ``\\boxed{}`` are those of the official code
(QwenLM/ProcessBench, commit e802463), and so are its quirks where two readings are possible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spark_nemo.records import AnswerVerdict, VariantOutcome, Verdict

from .bootstrap import Hits
from .reading import DataFileError, read_rows, required, required_text

_BOX = "\\boxed{"


@dataclass(frozen=True, slots=True)
class ProcessBenchCase:
    """One solution with the 0-based index of its first wrong step as ``label``, -1 when every step
    is right.
    """

    case_id: str
    generator: str
    problem: str
    steps: tuple[str, ...]
    final_answer_correct: bool
    label: int


@dataclass(frozen=True, slots=True)
class ProcessBenchScore:
    """Fractions in [0, 1]. ``acc_error`` is over the cases with an error, ``acc_correct`` over
    those without.
    """

    acc_error: float
    acc_correct: float
    f1: float
    num_error: int
    num_correct: int
    num_unparsed: int
    hits: Hits


def read_processbench(path: str | Path) -> list[ProcessBenchCase]:
    """Read an official split: a ``.json`` list, or ``.jsonl``. Fields beyond the official six are
    ignored.

    Raises ``DataFileError`` that names the file, the row and the field of the first malformed row.
    """
    cases = [_read_case(place, row) for place, row in read_rows(path)]
    repeated = [
        case_id for case_id, count in Counter(case.case_id for case in cases).items() if count > 1
    ]
    if repeated:
        raise DataFileError(f"{path}: field 'id' repeats {repeated[0]!r}: ids must be unique")
    return cases


def score_processbench(
    labels: Sequence[int], predictions: Sequence[int | None]
) -> ProcessBenchScore:
    """Score exact predictions of the first wrong step; None (nothing could be parsed) is wrong.

    ``f1`` is the harmonic mean of the two accuracies, and 0 when both are 0 (the official code
    divides by zero there). Raises ``ValueError`` when the lengths differ, or when one kind of case
    is absent: such a split has no F1.
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
    acc_error, acc_correct = float(error.mean()), float(correct.mean())
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
    """ProcessBench's overall number: the plain mean of the splits' F1, whatever their sizes."""
    values = [score.f1 for score in scores]
    if not values:
        raise ValueError("average F1 of no splits")
    return sum(values) / len(values)


def predict_first_error(outcome: VariantOutcome) -> int | None:
    """What a generative PRM predicts: its verdict's first wrong step; None for every kind of
    failure.

    Raises ``ValueError`` for an ORM's verdict, which names no step.
    """
    if isinstance(outcome, AnswerVerdict):
        raise ValueError(
            "an ORM's verdict names no step: it has no ProcessBench score, see evaluation.reward_model_scores"
        )
    return outcome.first_error if isinstance(outcome, Verdict) else None


def parse_critic_box(text: str) -> int | None:
    """A critic's prediction: the content of its last ``\\boxed{}``, which must be an integer; None
    otherwise.
    """
    box = boxed_vote(text)
    return None if box is None else _to_int(box)


def majority_prediction(texts: Iterable[str]) -> int | None:
    """The majority over several critics' texts, as in the official code.

    Votes are the boxed *strings* (``1`` and ``01`` differ, words vote too), texts without a box do
    not vote, the string seen first wins a tie, and the winner must be an integer.
    """
    return majority_vote(map(boxed_vote, texts))


def majority_vote(votes: Iterable[str | None]) -> int | None:
    """The majority rule of ``majority_prediction`` over what each critic boxed; None does not vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    return _to_int(counts.most_common(1)[0][0]) if counts else None


def boxed_vote(text: str) -> str | None:
    r"""What a critic's text votes for: the stripped content of its last box; None without a box.

    The official pattern is ``\\boxed\{([^}]*)\}``: a box ends at the first closing brace, none
    begins inside another. Found here in one pass, where the pattern takes minutes on a megabyte of
    boxes that never close.
    """
    content, start = None, text.find(_BOX)
    while start >= 0 and (end := text.find("}", start)) >= 0:
        content = text[start + len(_BOX) : end]
        start = text.find(_BOX, end)
    return None if content is None else content.strip()


def _to_int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _read_case(place: str, row: dict[str, object]) -> ProcessBenchCase:
    steps = required(place, row, "steps", list, "a list of step texts")
    if not steps or not all(isinstance(step, str) for step in steps):
        raise DataFileError(f"{place}: field 'steps' must be a non-empty list of strings")
    label = required(place, row, "label", int, "the 0-based index of the first wrong step, or -1")
    if not -1 <= label < len(steps):
        raise DataFileError(
            f"{place}: field 'label' is {label}, but must lie in -1..{len(steps) - 1} ('steps')"
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
