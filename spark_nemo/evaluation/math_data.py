"""The mathematics benchmarks in the formats in which they are distributed, and the Skywork prompts without answers.

Each loader gives ``EvalProblem`` rows whose ``problem_id`` is the benchmark's name and the file's own identifier. Every
``DataFileError`` names the file, the line (or row) and the field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from spark_nemo.grammar import extract_boxed
from spark_nemo.records import Problem
from spark_nemo.records.verl_parquet import read_verl_problems

from .answers import EvalProblem, read_eval_problems
from .reading import DataFileError, read_rows, required, required_text

read_skywork_prompts = read_verl_problems

_QUESTION = "the question's text"
_MAX_EXACT = 2 ** 53
"""Beyond it a JSON float no longer says which integer was meant."""

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class MathFormat:
    """Where a benchmark's rows keep their identifier and question, and how the reference answer is read."""

    id_field: str
    question_field: str
    answer: Callable[[str, Row], str]


def read_math(path: str | Path, benchmark: str | None = None) -> list[EvalProblem]:
    """Read a benchmark file. ``benchmark`` is a key of ``FORMATS``; None takes the file's stem.

    A file of no known benchmark must have our own fields (``problem_id``, ``question``, ``answer``). Raises
    ``DataFileError`` for a malformed row or a repeated identifier, ``ValueError`` for an unknown ``benchmark``.
    """
    path = Path(path)
    if benchmark is not None and benchmark not in FORMATS:
        raise ValueError(f"benchmark {benchmark!r}: known are {', '.join(FORMATS)}")
    name = benchmark or path.stem
    if name not in FORMATS:
        return read_eval_problems(path)
    layout, problems = FORMATS[name], {}
    for place, row in read_rows(path):
        problem_id = f"{name}-{_identifier(place, row, layout.id_field)}"
        if problem_id in problems:
            raise DataFileError(f"{place}: field {layout.id_field!r} repeats {row[layout.id_field]!r}: must be unique")
        question = required_text(place, row, layout.question_field, _QUESTION)
        problems[problem_id] = EvalProblem(Problem(problem_id, question, name), layout.answer(place, row))
    return list(problems.values())


def _identifier(place: str, row: Row, field: str) -> str:
    if type(row.get(field)) is int:
        return str(row[field])
    return required_text(place, row, field, "a number or string that identifies the problem")


def _text_answer(place: str, row: Row) -> str:
    return required_text(place, row, "answer", "the reference answer, a string")


def _number_answer(place: str, row: Row) -> str:
    """AMC 2023 keeps its answers as floats, all of them whole: 27.0 is 27."""
    if "answer" not in row:
        raise DataFileError(f"{place}: field 'answer' is missing: the reference answer, a number")
    value = row["answer"]
    if type(value) not in (int, float) or not isfinite(value) or abs(value) > _MAX_EXACT:
        raise DataFileError(f"{place}: field 'answer' is {str(value)[:40]!r}, but must be a finite number up to 2^53")
    return str(int(value)) if value == int(value) else str(value)


def _boxed_answer(place: str, row: Row) -> str:
    """Minerva Math has no answer field: it is the last box of the worked solution."""
    answer = extract_boxed(required_text(place, row, "solution", "the worked solution"))
    if not answer:
        raise DataFileError(f"{place}: field 'solution' has no \\boxed{{...}} with the reference answer")
    return answer


def _listed_answer(place: str, row: Row) -> str:
    """OlympiadBench's open-ended text problems hold one string, several answers separated by commas inside it."""
    answers = required(place, row, "final_answer", list, "a list with one reference answer")
    if len(answers) != 1 or not isinstance(answers[0], str) or not answers[0].strip():
        raise DataFileError(f"{place}: field 'final_answer' must be a list with one string that is not blank")
    return answers[0]


FORMATS: dict[str, MathFormat] = {
    "math500": MathFormat("unique_id", "problem", _text_answer),
    "aime24": MathFormat("id", "problem", _text_answer),
    "amc23": MathFormat("id", "problem", _number_answer),
    "minerva_math": MathFormat("idx", "problem", _boxed_answer),
    "olympiadbench": MathFormat("id", "question", _listed_answer),
}
"""By benchmark, which is also the stem of its file in QwenLM/Qwen2.5-Math and NJUNLP/R-PRM."""

