"""Read problem files and other JSONL, with line numbers in every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .types import Problem

_OTHER_NAMES = {"problem_id": ("unique_id", "id", "idx"), "question": ("problem",)}


class DataFileError(ValueError):
    """A data file that cannot be used; the one-line message names the file and, where it applies,
    line and field.
    """


def read_problems(path: str | Path) -> list[Problem]:
    """Read a JSONL file of objects with ``problem_id`` (a string or an integer, see ``id_of``),
    ``question`` and optionally ``source``, or a Parquet file in verl's layout
    (``read_verl_problems``).

    The names that the mathematics benchmarks use instead (``unique_id``, ``id`` or ``idx``, and
    ``problem``) are read too. Any other field, an answer above all, is dropped here and reaches no
    record. Raises ``DataFileError`` naming file and line of whatever is missing, malformed, empty
    or repeated.
    """
    if Path(path).suffix == ".parquet":
        from .verl_parquet import read_verl_problems

        return read_verl_problems(path)
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, row in json_rows(path):
        try:
            problem = _problem(row)
        except ValueError as error:
            raise DataFileError(f"{path}:{number}: {error}") from None
        if problem.problem_id in seen:
            first = seen[problem.problem_id]
            raise DataFileError(
                f"{path}:{number}: problem_id {problem.problem_id!r} is already on line {first}"
                + id_hint(problem.problem_id)
            )
        seen[problem.problem_id] = number
        problems.append(problem)
    return problems


def json_rows(path: str | Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a JSONL file with their line numbers, from 1.

    Raises ``DataFileError`` for a file that cannot be read or is empty, and naming file and line
    for an empty line and for one that is no JSON object in UTF-8.
    """
    # Bytes split at newline characters only; str.splitlines would also split at U+2028 inside a
    # question.
    try:
        lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror})") from None
    if lines == [b""]:
        raise DataFileError(f"{path}: the file is empty: it needs one JSON object per line")
    for number, line in enumerate(lines, start=1):
        try:
            yield number, _object(line)
        except ValueError as error:
            raise DataFileError(f"{path}:{number}: {error}") from None


def _object(line: bytes) -> dict[str, object]:
    if not line.strip():
        raise ValueError("empty line: remove it")
    try:
        data = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ValueError(f"a JSON object is needed, not {type(data).__name__}")
    return data


def _problem(data: dict[str, object]) -> Problem:
    _use_other_names(data)
    return Problem(
        id_of(data, "problem_id"), text_of(data, "question"), text_of(data, "source", "")
    )


def id_of(data: dict[str, object], name: str) -> str:
    """``data[name]``, a string or an integer, as text: files number their problems either way, and
    1 and "1" are one identifier. Raises ``ValueError`` naming the field.
    """
    value = data.get(name)
    return str(value) if type(value) is int else text_of(data, name, kind="a string or an integer")


def id_hint(identifier: str) -> str:
    """What to add when an identifier is there twice: two that differ in the file may be one as
    text.
    """
    return (
        " (an integer and a string of its digits are one id)"
        if identifier.lstrip("-").isdigit()
        else ""
    )


def text_of(
    data: dict[str, object], name: str, default: str | None = None, kind: str = "a string"
) -> str:
    """``data[name]``, a string that UTF-8 can hold. Raises ``ValueError`` naming the field, and
    what may be there.
    """
    value = data.get(name, default)
    if not isinstance(value, str):
        found = (
            f"not {type(value).__name__}"
            if name in data
            else f"it is missing; the row has {', '.join(data)}"
        )
        raise ValueError(f"{name!r} must be {kind}, {found}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{name!r} holds half of a surrogate pair, which is no character"
        ) from None
    return value


def _use_other_names(data: dict[str, object]) -> None:
    for name, others in _OTHER_NAMES.items():
        other = next((other for other in others if other in data), None)
        if name not in data and other is not None:
            data[name] = data[other]
