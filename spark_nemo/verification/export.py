"""Export of records and labels as flat rows, to JSONL or Parquet.

``COLUMNS`` are the columns by kind; other kinds have ``key``, ``parent``, ``text`` and
``num_tokens``. A field that is not listed goes, as JSON, into ``extra``. ``failure`` is the reason of
an outcome other than ``verdict``. Missing values are null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from spark_nemo.config import ConfigError
from spark_nemo.grammar import ParsedResponse
from spark_nemo.records import SOLUTION, VERIFICATION, Solution
from spark_nemo.records.store import RecordStore
from spark_nemo.utils.files import atomic_file

from .sampler import parse_solution

LABEL = "label"
Row = dict[str, object]
_ROWS_PER_GROUP = 1000

COLUMNS: dict[str, dict[str, str]] = {
    SOLUTION: {
        "key": "string",
        "problem_id": "string",
        "question": "string",
        "text": "string",
        "finish_reason": "string",
        "num_tokens": "int",
        "usable": "bool",
        "num_steps": "int",
    },
    VERIFICATION: {
        "key": "string",
        "solution_key": "string",
        "vote": "int",
        "text": "string",
        "num_tokens": "int",
        "outcome": "string",
        "failure": "string",
        "step_labels": "bools",
        "answer_correct": "bool",
    },
    LABEL: {
        "method": "string",
        "solution_key": "string",
        "problem_id": "string",
        "question": "string",
        "solution_text": "string",
        "step_labels": "bools",
        "answer_correct": "bool",
        "target_text": "string",
        "correct_votes": "ints",
        "num_votes": "int",
        "yes_votes": "int",
        "chosen_vote": "int",
        "matching_votes": "int",
    },
}
_OTHER = {"key": "string", "parent": "string", "text": "string", "num_tokens": "int"}


def store_rows(store: RecordStore, kind: str) -> Iterator[Row]:
    """Yield the records of a kind as rows, in the order read."""
    for key, payload in store.iter(kind):
        if kind == SOLUTION:
            row = _solution(payload)
        elif kind == VERIFICATION:
            row = _verification(payload)
        else:
            row = {**payload, "parent": store.parent(key, kind), "key": key}
        yield _columns(kind, row)


def label_rows(files: Iterable[Path]) -> Iterator[Row]:
    """Yield the rows of stage II's labels.jsonl files, flattened."""
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield _columns(LABEL, _label(json.loads(line)))


def write_rows(path: Path, kind: str | None, rows: Iterable[Row]) -> int:
    """Write a .jsonl or .parquet file, streaming and atomically; return the number of rows.

    Raises ``ConfigError`` for another file name, and for Parquet of several kinds (``kind`` None)
    or without pyarrow.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{path}: the name must end in .jsonl or .parquet")
    with atomic_file(path) as temporary:
        if path.suffix == ".jsonl":
            return _write_jsonl(temporary, rows)
        return _write_parquet(temporary, kind, rows)


def _write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    number = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            number += 1
    return number


def _write_parquet(path: Path, kind: str | None, rows: Iterable[Row]) -> int:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet needs pyarrow; pip install 'spark-nemo[parquet]', or write .jsonl"
        ) from error
    if kind is None:
        raise ConfigError(
            "a Parquet file has the columns of one kind; name it with --kind, or write .jsonl"
        )
    types = {
        "string": pyarrow.string(),
        "int": pyarrow.int64(),
        "bool": pyarrow.bool_(),
        "bools": pyarrow.list_(pyarrow.bool_()),
        "ints": pyarrow.list_(pyarrow.int64()),
    }
    columns = {"kind": "string", **COLUMNS.get(kind, _OTHER), "extra": "string"}
    schema = pyarrow.schema([(name, types[type_]) for name, type_ in columns.items()])
    number = 0
    remaining = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(remaining, _ROWS_PER_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
            number += len(group)
    return number


def _columns(kind: str, row: Row) -> Row:
    columns = COLUMNS.get(kind, _OTHER)
    extra = {
        name: value for name, value in row.items() if name not in columns and value is not None
    }
    return {
        "kind": kind,
        **{name: row.get(name) for name in columns},
        "extra": json.dumps(extra, ensure_ascii=False) if extra else None,
    }


def _solution(payload: Row) -> Row:
    parsed = parse_solution(Solution.from_json(payload))
    usable = isinstance(parsed, ParsedResponse)
    return {**payload, "usable": usable, "num_steps": len(parsed.steps) if usable else None}


def _verification(payload: Row) -> Row:
    outcome = dict(payload["outcome"])
    kind = outcome.pop("kind")
    labels = outcome.pop("step_labels", None)
    answer = outcome.pop("answer_correct", None)
    failure = None
    if kind != "verdict":
        failure = ", ".join(str(value) for value in outcome.values()) or kind
    return {
        **{name: value for name, value in payload.items() if name != "outcome"},
        "outcome": kind,
        "failure": failure,
        "step_labels": labels,
        "answer_correct": answer,
    }


def _label(row: Row) -> Row:
    solution = dict(row["solution"])
    evidence = dict(row["evidence"])
    rest = {name: value for name, value in row.items() if name not in ("solution", "evidence")}
    return {
        **evidence,
        **rest,
        "solution_key": solution["key"],
        "problem_id": solution["problem_id"],
        "question": solution["question"],
        "solution_text": solution["text"],
    }
