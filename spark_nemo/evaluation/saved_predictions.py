"""Scores saved ProcessBench outputs without a model, by the official rules (QwenLM/ProcessBench,
commit e802463).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bootstrap import Estimate, f1_estimate
from .processbench import (
    ProcessBenchCase,
    ProcessBenchScore,
    average_f1,
    boxed_vote,
    majority_vote,
    read_processbench,
    score_processbench,
)
from .reading import DataFileError, read_rows, required_text
from .tables import source_name


@dataclass(frozen=True, slots=True)
class SavedScore:
    """Scores by split (the data file's stem), the official average of their F1 and its interval
    over cases.

    ``votes`` is the number of predictions per case; above 1 the majority of them was scored.
    """

    splits: dict[str, ProcessBenchScore]
    average: float
    interval: Estimate
    votes: int


def read_splits(data: Sequence[str | Path]) -> dict[str, list[ProcessBenchCase]]:
    """The cases of all files (or ``hf:Qwen/ProcessBench::gsm8k``) by split, which is what a file is
    called.

    Raises ``DataFileError`` for a malformed row, two files of one name, or an identifier that two
    splits have.
    """
    splits = {source_name(path): read_processbench(path) for path in data}
    if len(splits) < len(data):
        raise DataFileError(
            f"{data[-1]}: two data files have the same name; the name is the split's"
        )
    counts = Counter(case.case_id for cases in splits.values() for case in cases)
    if repeated := [case_id for case_id, count in counts.items() if count > 1]:
        raise DataFileError(f"{data[-1]}: field 'id' repeats {repeated[0]!r} of another split")
    return splits


def score_saved_predictions(
    predictions: Sequence[str | Path], data: Sequence[str | Path]
) -> SavedScore:
    """Score the rows of all ``predictions`` files against all ``data`` splits; several files vote
    on their cases.

    Raises ``DataFileError`` that names file, row and field for a malformed row, an unknown or
    repeated identifier, a case without a prediction, or cases with different numbers of votes: such
    a score would compare unlike things.
    """
    splits = read_splits(data)
    votes: dict[str, list[str | None]] = {
        case.case_id: [] for cases in splits.values() for case in cases
    }
    for path in predictions:
        _collect(path, votes)
    first = next(iter(votes))
    for case_id, found in votes.items():
        if not found or len(found) != len(votes[first]):
            raise DataFileError(
                f"{predictions[-1]}: case {case_id!r} has {len(found)} predictions, {first!r} has "
                f"{len(votes[first])}: give every case the same number, at least one"
            )
    return score_votes(splits, votes)


def score_votes(
    splits: Mapping[str, Sequence[ProcessBenchCase]],
    votes: Mapping[str, Sequence[str | None]],
) -> SavedScore:
    """Score the majority of each case's votes; every case must have the same number of them, None
    for no vote.
    """
    scores = {
        name: score_processbench(
            [case.label for case in cases], [majority_vote(votes[case.case_id]) for case in cases]
        )
        for name, cases in splits.items()
    }
    return SavedScore(
        scores,
        average_f1(scores.values()),
        f1_estimate([score.hits for score in scores.values()]),
        len(next(iter(votes.values()))),
    )


def _collect(path: str | Path, votes: dict[str, list[str | None]]) -> None:
    seen: set[str] = set()
    for place, row in _prediction_rows(Path(path)):
        case_id = required_text(place, row, "id", "the case's identifier, such as gsm8k-0")
        if case_id not in votes:
            raise DataFileError(f"{place}: field 'id' is {case_id!r}, which no data file has")
        if case_id in seen:
            raise DataFileError(
                f"{place}: field 'id' repeats {case_id!r}: several votes on a case go into several "
                "files, or into a list 'generated_critique'"
            )
        seen.add(case_id)
        votes[case_id] += _votes(place, row)


def _prediction_rows(path: Path) -> list[tuple[str, dict[str, object]]]:
    """Rows of a JSONL file or JSON list, or the ``cases`` of a file that ``score_prm``
    wrote.
    """
    if path.suffix == ".json":
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            saved = None  # read_rows says what is wrong, in one line
        if isinstance(saved, dict) and isinstance(saved.get("cases"), list):
            rows = [
                (f"{path}:case {number}", row) for number, row in enumerate(saved["cases"], start=1)
            ]
            if bad := [place for place, row in rows if not isinstance(row, dict)]:
                raise DataFileError(f"{bad[0]}: must be a JSON object")
            return rows
    return list(read_rows(path))


def _votes(place: str, row: dict[str, object]) -> list[str | None]:
    """The strings a row votes for. A critic's text is read anew; a reward model's ``votes`` are
    indices as text or null; ``prediction`` is a whole number or null.
    """
    if "generated_critique" in row:
        texts = row["generated_critique"]
        texts = [texts] if isinstance(texts, str) else texts
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) for text in texts)
        ):
            raise DataFileError(
                f"{place}: field 'generated_critique' must be a text or a non-empty list of texts"
            )
        return [boxed_vote(text) for text in texts]
    if "votes" in row:
        votes = row["votes"]
        if (
            not isinstance(votes, list)
            or not votes
            or not all(vote is None or isinstance(vote, str) for vote in votes)
        ):
            raise DataFileError(
                f"{place}: field 'votes' must be a non-empty list of strings or nulls"
            )
        return votes
    if "prediction" not in row:
        raise DataFileError(
            f"{place}: has neither field 'generated_critique' (a critic's text) nor 'prediction'"
        )
    value = row["prediction"]
    if value is not None and type(value) is not int:
        raise DataFileError(
            f"{place}: field 'prediction' is {str(value)[:40]!r}, but must be a whole number or null"
        )
    return [None if value is None else str(value)]
