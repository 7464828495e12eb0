"""Questions from Parquet files in verl's layout, in which Skywork-OR1-RL-Data is distributed."""

from __future__ import annotations

from pathlib import Path

from .jsonl import DataFileError
from .types import Problem

_COLUMNS = ["prompt", "data_source"]


def read_verl_problems(path: str | Path) -> list[Problem]:
    """The questions of a Parquet file with the columns ``prompt`` (chat messages) and
    ``data_source``.

    Only these two columns are read: the reference answers never enter the process. The question is
    the last user message, the identifier is the row's place in the file. Raises ``DataFileError``
    naming the column or row.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataFileError(
            f"{path}: Parquet needs pyarrow: pip install 'spark-nemo[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        if missing := [name for name in _COLUMNS if name not in file.schema_arrow.names]:
            raise DataFileError(
                f"{path}: column {missing[0]!r} is missing: is this a Skywork-OR1 file?"
            )
        rows = file.read(columns=_COLUMNS).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataFileError(
            f"{path}: cannot be read as parquet ({' '.join(str(error).split())})"
        ) from error
    if not rows:
        raise DataFileError(f"{path}: has no rows")
    return [_problem(f"{path}:row {number + 1}", number, row) for number, row in enumerate(rows)]


def _problem(place: str, number: int, row: dict[str, object]) -> Problem:
    messages, source = row["prompt"], row["data_source"]
    if not isinstance(messages, list):
        raise DataFileError(f"{place}: field 'prompt' must be a list of chat messages")
    questions = [
        m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"
    ]
    if not questions or not isinstance(questions[-1], str) or not questions[-1].strip():
        raise DataFileError(f"{place}: field 'prompt' has no user message with text")
    if not isinstance(source, str) or not source.strip():
        raise DataFileError(f"{place}: field 'data_source' must be the name of the collection")
    return Problem(f"skywork-{number}", questions[-1], source)
