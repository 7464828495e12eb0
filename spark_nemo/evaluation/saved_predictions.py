"""Score saved ProcessBench outputs without a model, by the official rules.

The official rules are those of QwenLM/ProcessBench, commit e802463.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType

from spark_nemo.records.rows import DataFileError

from .bootstrap import Estimate, f1_estimate
from .data_rows import read_rows, required_text
from .hub_datasets import source_name
from .processbench import (
    ProcessBenchCase,
    ProcessBenchScore,
    average_f1,
    boxed_vote,
    majority_vote,
    read_processbench,
    score_processbench,
)


@dataclass(frozen=True, slots=True)
class SavedScore:
    """Scores by split (the data file's stem), and the official average of their F1.

    ``votes`` is the number of predictions per case; with more than one the majority is scored.
    """

    splits: dict[str, ProcessBenchScore]
    average: float
    interval: Estimate
    votes: int


def read_splits(data: Sequence[str | Path]) -> dict[str, list[ProcessBenchCase]]:
    """Read the cases of all files (or ``hf:Qwen/ProcessBench::gsm8k``) by split, the file's name.

    Raises ``DataFileError`` for a malformed row, two files of one name, or an identifier that two
    splits have.
    """
    splits = {source_name(path): read_processbench(path) for path in data}
    if len(splits) < len(data):
        raise DataFileError(
            f"{data[-1]}: two data files have the same name; the name is the split's"
        )
    counts = Counter(case.case_id for cases in splits.values() for case in cases)
    repeated = [case_id for case_id, count in counts.items() if count > 1]
    if repeated:
        raise DataFileError(f"{data[-1]}: field 'id' repeats {repeated[0]!r} of another split")
    return splits


def score_saved_predictions(
    predictions: Sequence[str | Path], data: Sequence[str | Path]
) -> SavedScore:
    """Score all ``predictions`` files against all ``data`` splits; several files vote together.

    Raises ``DataFileError`` that names file, row and field for a malformed row, an unknown or
    repeated identifier, a case without a prediction, or cases with different numbers of votes,
    whose score would not be comparable.
    """
    splits = read_splits(data)
    cases = [case for split in splits.values() for case in split]
    votes: dict[str, list[str | None]] = {case.case_id: [] for case in cases}
    for path in predictions:
        _add_votes(path, votes)
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
    """Score the majority of each case's votes; cases have equally many votes, None for no vote."""
    scores = {}
    for name, cases in splits.items():
        labels = [case.label for case in cases]
        scores[name] = score_processbench(
            labels, [majority_vote(votes[case.case_id]) for case in cases]
        )
    return SavedScore(
        splits=scores,
        average=average_f1(scores.values()),
        interval=f1_estimate([score.hits for score in scores.values()]),
        votes=len(next(iter(votes.values()))),
    )


def _add_votes(path: str | Path, votes: dict[str, list[str | None]]) -> None:
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
    """Return the rows of a JSONL file or JSON list, or the ``cases`` of a file of results."""
    if path.suffix == ".json":
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            saved = None  # read_rows reports the problem in one line
        if isinstance(saved, dict) and isinstance(saved.get("cases"), list):
            rows = []
            for number, row in enumerate(saved["cases"], start=1):
                place = f"{path}:case {number}"
                if not isinstance(row, dict):
                    raise DataFileError(f"{place}: must be a JSON object")
                rows.append((place, row))
            return rows
    return list(read_rows(path))


def _votes(place: str, row: dict[str, object]) -> list[str | None]:
    """Return the strings that a row votes for; a critic's saved text is parsed again."""
    if "generated_critique" in row:
        texts = row["generated_critique"]
        if isinstance(texts, str):
            texts = [texts]
        if not _is_list_of(str, texts):
            raise DataFileError(
                f"{place}: field 'generated_critique' must be a text or a non-empty list of texts"
            )
        return [boxed_vote(text) for text in texts]
    if "votes" in row:
        votes = row["votes"]
        if not _is_list_of(str | None, votes):
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
            f"{place}: field 'prediction' is {str(value)[:40]!r}, but must be an integer or null"
        )
    return [None if value is None else str(value)]


def _is_list_of(kind: type | UnionType, value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)
