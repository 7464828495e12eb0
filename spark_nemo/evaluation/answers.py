"""Answer keys, and the comparison of a predicted answer with a key.

``AnswerKey`` and ``EvalProblem`` are the only types in the package that hold a reference answer.
Stages I and II never see them. Stage III sees them at evaluation steps, and in training only in
the declared RLVR baseline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isfinite
from pathlib import Path

from spark_nemo.grammar import normalize_answer
from spark_nemo.records import Problem
from spark_nemo.records.rows import DataFileError, id_hint

from .checker import AnswerGrade, shared_checker
from .data_rows import read_rows, required_id, required_text

MAX_ANSWER_CHARS = 1000
"""Longest prediction that is compared; a longer one is wrong unless it equals the key literally."""

_INTEGER = re.compile(r"[+-]?\d{1,100}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d{1,100}\.\d{0,100}|\.\d{1,100})", re.ASCII)
_FRACTION = re.compile(
    r"([+-]?)(?:\\frac\{([+-]?\d{1,100})\}\{(\d{1,100})\}|([+]?\d{1,100})/(\d{1,100}))", re.ASCII
)


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """The reference answer of one problem, as written in the data file."""

    problem_id: str
    answer: str


@dataclass(frozen=True, slots=True)
class EvalProblem:
    """A held-out problem with its reference answer."""

    problem: Problem
    answer: str


def read_eval_problems(path: str | Path) -> list[EvalProblem]:
    """Read rows of ``problem_id``, ``question``, ``answer`` and optionally ``source``.

    An answer that is a number in the file is kept as text. Raises ``DataFileError`` that names the
    file, line and field of the first row that is malformed or repeats a ``problem_id``.
    """
    problems: dict[str, EvalProblem] = {}
    for place, row in read_rows(path):
        key = _read_key(place, row, problems)
        question = required_text(place, row, "question", "the question's text")
        source = row.get("source", "")
        if not isinstance(source, str):
            raise DataFileError(f"{place}: field 'source' must be a string")
        problems[key.problem_id] = EvalProblem(
            Problem(key.problem_id, question, source), key.answer
        )
    return list(problems.values())


def read_answer_keys(path: str | Path) -> dict[str, AnswerKey]:
    """Read rows of ``problem_id`` and ``answer``, such as ``data.rl_answers``, by problem id."""
    keys: dict[str, AnswerKey] = {}
    for place, row in read_rows(path):
        key = _read_key(place, row, keys)
        keys[key.problem_id] = key
    return keys


def answer_matches(predicted: str | None, gold: str) -> bool:
    """Return True if ``grade_answer`` finds the two equal."""
    return grade_answer(predicted, gold) is AnswerGrade.EQUAL


def grade_answer(predicted: str | None, gold: str) -> AnswerGrade:
    """Compare a final answer with the reference answer; no prediction (None, blank) is wrong.

    In this order: text after ``normalize_answer``; plain numbers, compared exactly (``27.0`` =
    ``27``, ``0.5`` = ``\\frac{1}{2}``); otherwise math-verify 0.8+, ``verify(gold, answer)``, in a
    worker process with limits of time and memory (see ``checker``). Results of math-verify are
    cached, so a hostile string costs its time limit once.

    Two forms that math-verify accepts are rejected here because a policy could learn them: an
    equation whose left side is not one symbol (``6 = 5`` for 5), and unbalanced braces or a second
    box inside the answer.
    """
    if predicted is None or not predicted.strip():
        return AnswerGrade.DIFFERENT
    if predicted.strip() == gold.strip():
        return AnswerGrade.EQUAL
    if len(predicted) > MAX_ANSWER_CHARS:
        return AnswerGrade.DIFFERENT
    answer = normalize_answer(predicted)
    key = normalize_answer(gold)
    if answer == key:
        return AnswerGrade.EQUAL if answer else AnswerGrade.DIFFERENT
    number = _number(answer)
    if number is not None and number == _number(key):
        return AnswerGrade.EQUAL
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(key):
        return AnswerGrade.DIFFERENT
    if not answer or ("=" in answer and "=" not in key):
        return AnswerGrade.DIFFERENT
    if "\\boxed" in answer or not _balanced(answer):
        return AnswerGrade.DIFFERENT
    return _math_verify_grade(answer, key)


def grade_answers(pairs: Sequence[tuple[str | None, str]]) -> list[AnswerGrade]:
    """Grade every ``(predicted, gold)`` pair, using the checker's workers in parallel."""
    predictions = [predicted for predicted, _ in pairs]
    keys = [gold for _, gold in pairs]
    with ThreadPoolExecutor(shared_checker().workers) as threads:
        return list(threads.map(grade_answer, predictions, keys))


def _read_key(place: str, row: dict[str, object], seen: dict[str, object]) -> AnswerKey:
    problem_id = required_id(
        place, row, "problem_id", "a number or string that identifies the problem"
    )
    if problem_id in seen:
        raise DataFileError(
            f"{place}: field 'problem_id' repeats {problem_id!r}: ids must be unique"
            + id_hint(problem_id)
        )
    answer = row.get("answer")
    if type(answer) is float and not isfinite(answer):
        raise DataFileError(
            f"{place}: field 'answer' is {answer}, but must be a finite number or a string"
        )
    if type(answer) in (int, float):
        return AnswerKey(problem_id, str(answer))
    return AnswerKey(
        problem_id,
        required_text(place, row, "answer", "the reference answer, a string or a number"),
    )


def _number(text: str) -> Fraction | None:
    """Return the exact value of an integer, decimal or simple fraction; None for anything else."""
    if _INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, top, bottom, plain_top, plain_bottom = match.groups()
    denominator = int(bottom or plain_bottom)
    if denominator == 0:
        return None
    value = Fraction(int(top or plain_top), denominator)
    return -value if sign == "-" else value


def _balanced(text: str) -> bool:
    depth = 0
    for character in text.replace(r"\{", "").replace(r"\}", ""):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


@lru_cache(maxsize=65536)
def _math_verify_grade(predicted: str, gold: str) -> AnswerGrade:
    return shared_checker().grade(gold, predicted)
