"""Read the mathematics benchmarks as they are distributed.

Files and Hugging Face datasets of one benchmark name their columns differently, so each field is
looked up under all names in use. Every ``DataFileError`` names the file, the line (or row) and the
field.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from spark_nemo.grammar import extract_boxed
from spark_nemo.records import Problem, content_key
from spark_nemo.records.rows import DataFileError

from .answers import EvalProblem, read_eval_problems
from .data_rows import read_rows, required_id, required_text
from .hub_datasets import source_name

logger = logging.getLogger(__name__)

BENCHMARKS: dict[str, int] = {
    "math500": 500,
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "minerva_math": 272,
    "olympiadbench": 675,
}
"""Number of problems behind published figures, by benchmark (QwenLM/Qwen2.5-Math).

AIME has two papers of 15 problems a year.
"""

_SPELLINGS = {re.sub("[^a-z0-9]", "", name): name for name in BENCHMARKS}
_SPELLINGS |= {
    "aime2024": "aime24",
    "aime2025": "aime25",
    "amc2023": "amc23",
    "minerva": "minerva_math",
}
_IDS = ("unique_id", "problem_id", "id", "idx", "ID", "problem_idx")
_QUESTIONS = ("problem", "question", "Problem", "Question")
_ANSWERS = ("answer", "final_answer", "Answer", "expected_answer")
_SOLUTIONS = ("solution", "Solution")
_MAX_EXACT = 2**53
"""Largest integer that a JSON float holds exactly."""

Row = dict[str, object]


def benchmark_of(source: str | Path) -> str | None:
    """Return the benchmark in a source's name, such as ``hf:math-ai/aime25``, or None."""
    return _SPELLINGS.get(re.sub("[^a-z0-9]", "", source_name(source).lower()))


def read_math(source: str | Path, benchmark: str | None = None) -> list[EvalProblem]:
    """Read a benchmark from JSONL, JSON, Parquet or ``hf:owner/name[:config][:split]``.

    ``benchmark`` is a key of ``BENCHMARKS``; None takes it from the source's name. A ``problem_id``
    joins the benchmark's name and the row's own identifier, or 12 digits of a hash of the question
    for rows without one. A source of no known benchmark must have the fields ``problem_id``,
    ``question`` and ``answer``. Raises ``DataFileError`` for a malformed row or a repeated
    identifier, and ``ValueError`` for an unknown ``benchmark``.
    """
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark {benchmark!r}: known are {', '.join(BENCHMARKS)}")
    name = benchmark or benchmark_of(source)
    if name is None:
        return read_eval_problems(source)
    problems: dict[str, EvalProblem] = {}
    for place, row in read_rows(source):
        field = _field(place, row, _QUESTIONS, "the question's text")
        question = required_text(place, row, field, "the question's text")
        id_field, identifier = _identifier(place, row, question, field)
        problem_id = f"{name}-{identifier}"
        if problem_id in problems:
            raise DataFileError(
                f"{place}: field {id_field!r} repeats {str(row[id_field])[:40]!r}: must be unique"
            )
        problems[problem_id] = EvalProblem(Problem(problem_id, question, name), _answer(place, row))
    return list(problems.values())


def read_math_sets(
    sources: Sequence[str | Path], benchmark: str | None = None
) -> dict[str, list[EvalProblem]]:
    """Read several sources by benchmark (or by the source's name), joining those of one benchmark.

    Logs a warning for a set of another size than the published figures are over. Raises
    ``DataFileError`` as ``read_math`` does, and for a problem that two sources have.
    """
    sets: dict[str, list[EvalProblem]] = {}
    seen: set[str] = set()
    for source in sources:
        problems = read_math(source, benchmark)
        ids = {problem.problem.problem_id for problem in problems}
        repeated = seen & ids
        if repeated:
            raise DataFileError(
                f"{source}: problem {min(repeated)!r} is in another file of --data too"
            )
        seen |= ids
        name = benchmark or benchmark_of(source) or source_name(source)
        sets.setdefault(name, []).extend(problems)
    for name, problems in sets.items():
        _warn_about_size(name, len(problems))
    return sets


def _warn_about_size(name: str, count: int) -> None:
    if name == "amc23" and count == 83:
        logger.warning(
            "amc23: these 83 problems are AMC 2022 and 2023 together (AI-MO), not the 40 that "
            "published figures are over: do not compare with those"
        )
    elif count != BENCHMARKS.get(name, count):
        logger.warning(
            "%s: %d problems, where published figures are over %d", name, count, BENCHMARKS[name]
        )


def _field(place: str, row: Row, names: Sequence[str], meaning: str) -> str:
    for name in names:
        if name in row:
            return name
    raise DataFileError(
        f"{place}: field {names[0]!r} is missing: {meaning} (also read: {', '.join(names[1:])})"
    )


def _identifier(place: str, row: Row, question: str, question_field: str) -> tuple[str, str]:
    """Return the field that identifies a row, and its value."""
    for field in _IDS:
        if field in row:
            meaning = "a number or string that identifies the problem"
            return field, required_id(place, row, field, meaning)
    # A hash, because a row's number would change with the order of the rows.
    return question_field, content_key(question)[:12]


def _answer(place: str, row: Row) -> str:
    """Return the answer field, or without one the last box of the worked solution."""
    if not any(name in row for name in _ANSWERS):
        # Minerva Math has its answers in solutions only.
        for name in _SOLUTIONS:
            if name in row:
                return _boxed_answer(place, row, name)
    field = _field(place, row, _ANSWERS, "the reference answer")
    value = row[field]
    if isinstance(value, list):
        # OlympiadBench's open-ended text problems have a list with one string; several answers are
        # separated by commas inside it.
        if len(value) != 1:
            raise DataFileError(
                f"{place}: field {field!r} must be one reference answer or a list with one"
            )
        value = value[0]
    if type(value) is float:
        if not isfinite(value) or abs(value) > _MAX_EXACT:
            raise DataFileError(
                f"{place}: field {field!r} is {str(value)[:40]!r}, but must be a finite "
                "number up to 2^53"
            )
        # AMC 2023 writes whole numbers as 27.0.
        return str(int(value)) if value == int(value) else str(value)
    if type(value) is int:
        return str(value)
    return required_text(place, {field: value}, field, "the reference answer, a string or a number")


def _boxed_answer(place: str, row: Row, field: str) -> str:
    answer = extract_boxed(required_text(place, row, field, "the worked solution"))
    if not answer:
        raise DataFileError(
            f"{place}: field {field!r} has no \\boxed{{...}} with the reference answer"
        )
    return answer
