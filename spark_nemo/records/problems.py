"""Problem files: questions without their answers."""

from __future__ import annotations

from pathlib import Path

from .rows import DataFileError, Row, id_hint, id_of, read_rows, text_of
from .types import Problem

# Names that mathematics benchmarks use for our fields.
_OTHER_NAMES = {"problem_id": ("unique_id", "id", "idx"), "question": ("problem",)}
_VERL_COLUMNS = ("prompt", "data_source")


def read_problems(path: str | Path) -> list[Problem]:
    """Read a JSONL file of ``problem_id``, ``question`` and optionally ``source``.

    A ``.parquet`` file is read in verl's layout (``read_verl_problems``). ``unique_id``, ``id`` or
    ``idx`` may stand for ``problem_id``, and ``problem`` for ``question``. Every other field, an
    answer above all, is dropped here. Raises ``DataFileError`` naming file and line.
    """
    if Path(path).suffix == ".parquet":
        return read_verl_problems(path)
    problems: list[Problem] = []
    first_place: dict[str, str] = {}
    for place, row in read_rows(path):
        try:
            problem = _problem(row)
        except ValueError as error:
            raise DataFileError(f"{place}: {error}") from None
        if problem.problem_id in first_place:
            earlier = first_place[problem.problem_id].removeprefix(f"{path}:")
            raise DataFileError(
                f"{place}: problem_id {problem.problem_id!r} is already on {earlier}"
                + id_hint(problem.problem_id)
            )
        first_place[problem.problem_id] = place
        problems.append(problem)
    return problems


def read_verl_problems(path: str | Path) -> list[Problem]:
    """Read the questions of a Parquet file in verl's layout, as of Skywork-OR1-RL-Data.

    Only the columns ``prompt`` (chat messages) and ``data_source`` are read, so reference answers
    never enter the process. The question is the last user message, and the identifier is the row's
    place in the file. Raises ``DataFileError`` naming the column or row.
    """
    return [
        _verl_problem(place, number, row)
        for number, (place, row) in enumerate(read_rows(path, columns=_VERL_COLUMNS))
    ]


def _problem(row: Row) -> Problem:
    for name, others in _OTHER_NAMES.items():
        found = [other for other in others if other in row]
        if name not in row and found:
            row[name] = row[found[0]]
    return Problem(id_of(row, "problem_id"), text_of(row, "question"), text_of(row, "source", ""))


def _verl_problem(place: str, number: int, row: Row) -> Problem:
    messages = row["prompt"]
    source = row["data_source"]
    if not isinstance(messages, list):
        raise DataFileError(f"{place}: field 'prompt' must be a list of chat messages")
    questions = [
        message.get("content")
        for message in messages
        if isinstance(message, dict) and message.get("role") == "user"
    ]
    if not questions or not isinstance(questions[-1], str) or not questions[-1].strip():
        raise DataFileError(f"{place}: field 'prompt' has no user message with text")
    if not isinstance(source, str) or not source.strip():
        raise DataFileError(f"{place}: field 'data_source' must be the name of the collection")
    return Problem(f"skywork-{number}", questions[-1], source)
