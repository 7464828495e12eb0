"""Rows of evaluation data and their required fields; every error names file, row and field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from spark_nemo.records.rows import DataFileError, Row
from spark_nemo.records.rows import read_rows as file_rows

from .hub_datasets import HubName, hub_rows

T = TypeVar("T")


def read_rows(source: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield ``(place, row)`` of a local file, or of a dataset ``hf:owner/name[:config][:split]``.

    Files are read as ``records.rows.read_rows`` does, blank lines skipped. Raises
    ``DataFileError``.
    """
    hub = HubName.parse(source)
    if hub is None:
        yield from file_rows(source, skip_blank_lines=True)
    else:
        yield from hub_rows(hub)


def required(place: str, row: dict[str, object], field: str, kind: type[T], meaning: str) -> T:
    """Return ``row[field]``, exactly of type ``kind``; raises ``DataFileError``."""
    if field not in row:
        raise DataFileError(f"{place}: field {field!r} is missing: {meaning}")
    if type(row[field]) is not kind:
        raise DataFileError(
            f"{place}: field {field!r} is {_shown(row[field])}, but must be {meaning}"
        )
    return row[field]


def required_text(place: str, row: dict[str, object], field: str, meaning: str) -> str:
    """Return a string that is not blank and that UTF-8 can encode; raises ``DataFileError``."""
    text = required(place, row, field, str, meaning)
    if not text.strip():
        raise DataFileError(f"{place}: field {field!r} is blank, but must be {meaning}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataFileError(
            f"{place}: field {field!r} holds half of a surrogate pair, which is not a character"
        ) from None
    return text


def required_id(place: str, row: dict[str, object], field: str, meaning: str) -> str:
    """Return a string, or an integer as text: 1 and "1" are one id; raises ``DataFileError``."""
    value = row.get(field)
    return str(value) if type(value) is int else required_text(place, row, field, meaning)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
