"""Rows of JSONL, JSON and Parquet files; every error names the file and the line or row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = dict[str, object]


class DataFileError(ValueError):
    """An invalid data file. The message is one line with the file and, if known, line and field."""


def read_rows(
    path: str | Path, *, skip_blank_lines: bool = False, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """Yield ``(place, row)`` of a ``.parquet`` file, a ``.json`` list of objects, or JSONL.

    ``place`` is ``file:line 3`` or ``file:row 3``, counted from 1. ``columns`` are the only ones
    read of a Parquet file. Raises ``DataFileError`` for a missing or empty file, invalid JSON or
    Parquet, text that is not UTF-8, and a row that is not an object.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, columns)
    elif path.suffix == ".json":
        rows = _json_list_rows(path)
    else:
        rows = _json_lines(path, skip_blank_lines)
    is_empty = True
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataFileError(f"{place}: must be a JSON object, not {type(row).__name__}")
        is_empty = False
        yield place, row
    if is_empty:
        raise DataFileError(f"{path}: has no rows")


def id_of(row: Row, name: str) -> str:
    """``row[name]``, a string or an integer, as text: 1 and "1" are one identifier.

    Raises ``ValueError`` naming the field.
    """
    value = row.get(name)
    if type(value) is int:
        return str(value)
    return text_of(row, name, kind="a string or an integer")


def id_hint(identifier: str) -> str:
    """Addition to the error of a repeated identifier: the two may differ in the file."""
    if identifier.lstrip("-").isdigit():
        return " (an integer and a string of its digits are one id)"
    return ""


def text_of(row: Row, name: str, default: str | None = None, kind: str = "a string") -> str:
    """``row[name]``, a string that UTF-8 can encode. Raises ``ValueError`` naming the field."""
    value = row.get(name, default)
    if not isinstance(value, str):
        if name in row:
            found = f"not {type(value).__name__}"
        else:
            found = f"it is missing; the row has {', '.join(row)}"
        raise ValueError(f"{name!r} must be {kind}, {found}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{name!r} holds half of a surrogate pair, which is not a character"
        ) from None
    return value


def _json_lines(path: Path, skip_blank_lines: bool) -> Iterator[tuple[str, object]]:
    # Split at newline characters only: str.splitlines would also split at U+2028 inside a question.
    lines = _read(path).removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        return
    for number, line in enumerate(lines, start=1):
        place = f"{path}:line {number}"
        if line.strip():
            yield place, _parse_json(place, line)
        elif not skip_blank_lines:
            raise DataFileError(f"{place}: empty line; remove it")


def _json_list_rows(path: Path) -> Iterator[tuple[str, object]]:
    rows = _parse_json(str(path), _read(path))
    if not isinstance(rows, list):
        raise DataFileError(f"{path}: must hold a JSON list of rows, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{path}:row {number}", row


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataFileError(
            f"{path}: Parquet needs pyarrow: pip install 'spark-nemo[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        found = file.schema_arrow.names
        missing = [name for name in columns or () if name not in found]
        if missing:
            raise DataFileError(
                f"{path}: column {missing[0]!r} is missing; the file has {', '.join(found)}"
            )
        rows = file.read(columns=None if columns is None else list(columns)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataFileError(f"{path}: cannot be read as parquet ({_one_line(error)})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:row {number}", row


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror})") from error


def _parse_json(place: str, text: bytes) -> object:
    try:
        return json.loads(text.decode("utf-8"))
    # Not only JSONDecodeError: a number of too many digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"{place}: not valid JSON in UTF-8 ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
