"""Answer keys and how a predicted answer is compared with one.

``AnswerKey`` and ``EvalProblem`` are the only types in the package that hold a reference answer.
Stages I and II never see them; stage III sees them at evaluation steps, and in training only in the
declared RLVR baseline.
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

from spark_nemo.records import Problem
from spark_nemo.records.jsonl import id_hint

from .checker import AnswerGrade, shared_checker
from .reading import DataFileError, read_rows, required_id, required_text

MAX_ANSWER_CHARS = 1000
"""A longer prediction is wrong unless it equals the key literally: no final answer is that long."""

_INTEGER = re.compile(r"[+-]?\d{1,100}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d{1,100}\.\d{0,100}|\.\d{1,100})", re.ASCII)
_FRACTION = re.compile(
    r"([+-]?)(?:\\frac\{([+-]?\d{1,100})\}\{(\d{1,100})\}|([+]?\d{1,100})/(\d{1,100}))", re.ASCII
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)
_ASSIGNMENT = re.compile(r"[A-Za-z](_\{?\w+\}?)?=", re.ASCII)


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
    """Read JSONL (or a .json list) with ``problem_id``, ``question``, ``answer`` and optionally
    ``source``.

    An answer may be a number in the file; it is kept as text. Raises ``DataFileError`` that names
    the file, line and field of the first row that is malformed or repeats a ``problem_id``.
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
    """Read ``problem_id`` and ``answer`` rows by problem id: the keys of the RLVR baseline
    (``data.rl_answers``).
    """
    keys: dict[str, AnswerKey] = {}
    for place, row in read_rows(path):
        key = _read_key(place, row, keys)
        keys[key.problem_id] = key
    return keys


def answer_matches(predicted: str | None, gold: str) -> bool:
    """Whether ``judge_answer`` finds the two equal."""
    return judge_answer(predicted, gold) is AnswerGrade.EQUAL


def judge_answer(predicted: str | None, gold: str) -> AnswerGrade:
    """Whether a final answer equals the reference answer. No prediction (None, blank) is wrong.

    In this order: equal after ``normalise_answer``; both plain numbers, compared exactly (``27.0``
    = ``27``, ``0.5`` = ``\\frac{1}{2}``); otherwise math-verify 0.8+, ``verify(gold, answer)``, in
    a worker process with limits of time and memory (``checker``). A string that math-verify cannot
    judge within them is ``LATE`` or ``DIED``. Results of the slow path are remembered, so a hostile
    string costs its time limit once.

    Two things that math-verify accepts are refused here because a policy could learn them: an
    equation whose left side is not one symbol (``6 = 5`` for 5), and unbalanced braces or a second
    box inside the answer.
    """
    if predicted is None or not predicted.strip():
        return AnswerGrade.DIFFERENT
    if predicted.strip() == gold.strip():
        return AnswerGrade.EQUAL
    if len(predicted) > MAX_ANSWER_CHARS:
        return AnswerGrade.DIFFERENT
    left, right = normalise_answer(predicted), normalise_answer(gold)
    if left == right:
        return AnswerGrade.EQUAL if left else AnswerGrade.DIFFERENT
    number, gold_number = _number(left), _number(right)
    if number is not None and number == gold_number:
        return AnswerGrade.EQUAL
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right):
        return AnswerGrade.DIFFERENT
    if not left or ("=" in left and "=" not in right) or "\\boxed" in left or not _balanced(left):
        return AnswerGrade.DIFFERENT
    return _checked(left, right)


def grade_answers(pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
    """``answer_matches`` of every ``(predicted, gold)``, the slow ones at the same time in the
    checker's workers.
    """
    return [judgement is AnswerGrade.EQUAL for judgement in judge_answers(pairs)]


def judge_answers(pairs: Sequence[tuple[str | None, str]]) -> list[AnswerGrade]:
    """``judge_answer`` of every ``(predicted, gold)``, the slow ones at the same time in the
    checker's workers.
    """
    with ThreadPoolExecutor(shared_checker().workers) as threads:
        return list(threads.map(lambda pair: judge_answer(*pair), pairs))


def normalise_answer(text: str) -> str:
    """Remove what never changes an answer's value: dollar signs, spacing, thousands commas, ``x
    =``, a final full stop.

    ``\\dfrac`` and ``\\tfrac`` become ``\\frac``, ``\\text{...}`` its content, and a percent or
    degree sign is dropped as a unit. Also the key by which majority voting groups answers.
    """
    text = text.strip().strip("$").strip()
    text = re.sub(r"\\(?:left|right|quad|qquad)(?![A-Za-z])|\\[!,;: ]", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|\\%|%|\\\$", "", text)
    text = re.sub(r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])\s+|\s+(?![A-Za-z])", "", text).removesuffix(".")
    text = text[len(match.group()) :] if (match := _ASSIGNMENT.match(text)) else text
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _read_key(place: str, row: dict[str, object], seen: dict[str, object]) -> AnswerKey:
    problem_id = required_id(
        place, row, "problem_id", "a number or string that identifies the problem"
    )
    if problem_id in seen:
        raise DataFileError(
            f"{place}: field 'problem_id' repeats {problem_id!r}: ids must be unique"
            + id_hint(problem_id)
        )
    if type(row.get("answer")) in (int, float):
        if type(row["answer"]) is float and not isfinite(row["answer"]):
            raise DataFileError(
                f"{place}: field 'answer' is {row['answer']}, but must be a finite number or a string"
            )
        row = {**row, "answer": str(row["answer"])}
    return AnswerKey(
        problem_id,
        required_text(place, row, "answer", "the reference answer, a string or a number"),
    )


def _number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal or a simple fraction; None for anything else (or
    division by 0).
    """
    if _INTEGER.fullmatch(text) or _DECIMAL.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, top, bottom, plain_top, plain_bottom = match.groups()
    denominator = int(bottom or plain_bottom)
    return (
        None
        if denominator == 0
        else (-1 if sign == "-" else 1) * Fraction(int(top or plain_top), denominator)
    )


def _balanced(text: str) -> bool:
    depth = 0
    for character in text.replace(r"\{", "").replace(r"\}", ""):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


@lru_cache(maxsize=65536)
def _checked(predicted: str, gold: str) -> AnswerGrade:
    return shared_checker().judge(gold, predicted)
