"""Reading evaluation files. Every error names the file, the line or row, and the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from spark_nemo.records.jsonl import DataFileError

from .tables import HubName, hub_rows, parquet_rows

T = TypeVar("T")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield ``(place, row)`` of a ``.jsonl`` file (blank lines are skipped), a ``.json`` list of
    objects, a ``.parquet`` file, or a Hugging Face dataset written
    ``hf:owner/name[:config][:split]``.

    ``place`` reads ``file:line 3`` or ``file:row 3``, counted from 1. Raises ``DataFileError`` for
    a missing or empty file, bytes that are not UTF-8, bad JSON or Parquet, a row that is not an
    object, or a dataset that is not there.
    """
    count = 0
    for place, row in _any_rows(path):
        if not isinstance(row, dict):
            raise DataFileError(f"{place}: must be a JSON object, not {type(row).__name__}")
        count += 1
        yield place, row
    if count == 0:
        raise DataFileError(f"{path}: has no rows")


def required(place: str, row: dict[str, object], field: str, kind: type[T], meaning: str) -> T:
    """``row[field]``, which must be there and of exactly this type (a bool is not an int). Raises
    ``DataFileError``.
    """
    if field not in row:
        raise DataFileError(f"{place}: field {field!r} is missing: {meaning}")
    if type(row[field]) is not kind:
        raise DataFileError(
            f"{place}: field {field!r} is {_shown(row[field])}, but must be {meaning}"
        )
    return row[field]


def required_text(place: str, row: dict[str, object], field: str, meaning: str) -> str:
    """A required string that is not blank and that UTF-8 can hold. Raises ``DataFileError``."""
    text = required(place, row, field, str, meaning)
    if not text.strip():
        raise DataFileError(f"{place}: field {field!r} is blank, but must be {meaning}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataFileError(
            f"{place}: field {field!r} holds half of a surrogate pair, which is no character"
        ) from None
    return text


def required_id(place: str, row: dict[str, object], field: str, meaning: str) -> str:
    """``required_text``, or an integer as text: 1 and "1" are one identifier. Raises
    ``DataFileError``.
    """
    value = row.get(field)
    return str(value) if type(value) is int else required_text(place, row, field, meaning)


def _any_rows(source: str | Path) -> Iterator[tuple[str, object]]:
    if hub := HubName.parse(source):
        return hub_rows(hub)
    path = Path(source)
    if path.suffix == ".parquet":
        return parquet_rows(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: byte {error.start} is not UTF-8") from error
    return _json_rows(path, text) if path.suffix == ".json" else _jsonl_rows(path, text)


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # a plain ValueError for a number of too many digits
        raise DataFileError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataFileError(f"{path}: must hold a JSON list of rows, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}:row {number}", row


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataFileError(f"{place}: not valid JSON ({error})") from error
        yield place, row


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
