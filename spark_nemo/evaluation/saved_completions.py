"""Saved completions of mathematics problems; one command grades them again without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spark_nemo.grammar import extract_boxed
from spark_nemo.records.rows import DataFileError
from spark_nemo.utils.files import write_text_atomic

from .accuracy import GradedSample, greedy_values, majority_values, pass_at_k_values, problem_rates
from .answers import EvalProblem, grade_answers
from .bootstrap import DEFAULT_SAMPLES, Estimate, grouped_mean_estimate, mean_estimate
from .checker import AnswerGrade
from .data_rows import read_rows, required, required_id


@dataclass(frozen=True, slots=True)
class SavedCompletion:
    """One completion; ``sample`` counts the samples of a problem from 0, greedy ones separately."""

    problem_id: str
    sample: int
    greedy: bool
    text: str


@dataclass(frozen=True, slots=True)
class MathScore:
    """Score of one benchmark.

    ``values`` are by problem under each metric's name: ``greedy pass@1`` for greedy completions,
    ``avg@k`` and so on for sampled ones. ``estimates`` are their means with intervals. The
    ``ungraded`` answers, whose comparison timed out or crashed, count as wrong.
    """

    problems: int
    values: dict[str, dict[str, float]]
    estimates: dict[str, Estimate]
    greedy: list[GradedSample]
    sampled: list[GradedSample]
    ungraded: int


def write_completions(path: str | Path, completions: Sequence[SavedCompletion]) -> None:
    """Write JSONL that ``read_completions`` reads."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in completions]
    write_text_atomic(path, "".join(lines))


def read_completions(path: str | Path) -> list[SavedCompletion]:
    """Read rows of ``problem_id``, ``text`` and optionally ``sample`` (0) and ``greedy`` (false).

    Raises ``DataFileError`` that names the file, line and field.
    """
    rows = []
    seen = set()
    for place, row in read_rows(path):
        row.setdefault("sample", 0)
        row.setdefault("greedy", False)
        saved = SavedCompletion(
            problem_id=required_id(place, row, "problem_id", "the problem's identifier"),
            sample=required(place, row, "sample", int, "the sample's number, from 0"),
            greedy=required(place, row, "greedy", bool, "true or false"),
            text=required(place, row, "text", str, "the completion"),
        )
        key = (saved.problem_id, saved.sample, saved.greedy)
        if key in seen:
            raise DataFileError(
                f"{place}: field 'sample' repeats {saved.sample} of problem {saved.problem_id!r}"
            )
        seen.add(key)
        rows.append(saved)
    return rows


def score_completions(
    completions: Sequence[SavedCompletion],
    problems: Sequence[EvalProblem],
    ks: Sequence[int] = (),
    samples: int = DEFAULT_SAMPLES,
) -> MathScore:
    """Grade completions by their last box, and estimate with intervals over problems.

    ``ks`` are the k of pass@k and maj@k; the default are the powers of two up to the number of
    samples per problem, and that number itself. Raises ``ValueError`` for a completion of an
    unknown problem, a problem without completions, unequal numbers of samples, or a k beyond them.
    """
    keys = {problem.problem.problem_id: problem.answer for problem in problems}
    for row in completions:
        if row.problem_id not in keys:
            raise ValueError(f"completion of problem {row.problem_id!r}, which is not in the data")
    answers = [extract_boxed(row.text) for row in completions]
    grades = grade_answers(
        [(answer, keys[row.problem_id]) for answer, row in zip(answers, completions)]
    )
    greedy = []
    sampled = []
    for row, grade, answer in zip(completions, grades, answers):
        graded = GradedSample(row.problem_id, row.sample, grade is AnswerGrade.EQUAL, answer)
        if row.greedy:
            greedy.append(graded)
        else:
            sampled.append(graded)
    values: dict[str, dict[str, float]] = {}
    if greedy:
        _check_complete("greedy", greedy, keys)
        values["greedy pass@1"] = greedy_values(greedy)
    if sampled:
        _check_complete("sampled", sampled, keys)
        count = len(sampled) // len(keys)
        values[f"avg@{count}"] = problem_rates(sampled)
        for k in ks or _default_ks(count):
            values[f"pass@{k}"] = pass_at_k_values(sampled, k)
            values[f"maj@{k}"] = majority_values(sampled, k)
    estimates = {}
    for name, by_problem in values.items():
        estimates[name] = mean_estimate(list(by_problem.values()), samples)
    return MathScore(
        problems=len(keys),
        values=values,
        estimates=estimates,
        greedy=greedy,
        sampled=sampled,
        ungraded=grades.count(AnswerGrade.TIMEOUT) + grades.count(AnswerGrade.CRASHED),
    )


def _check_complete(kind: str, rows: Sequence[GradedSample], keys: Mapping[str, str]) -> None:
    missing = keys.keys() - {row.problem_id for row in rows}
    if missing:
        raise ValueError(
            f"problem {min(missing)!r} has no {kind} completion: a score needs every problem"
        )


def _default_ks(count: int) -> list[int]:
    powers = {2**exponent for exponent in range(1, count.bit_length())}
    return sorted((powers | {count}) - {1})


def score_sets(
    completions: Sequence[SavedCompletion],
    sets: Mapping[str, Sequence[EvalProblem]],
    ks: Sequence[int] = (),
    samples: int = DEFAULT_SAMPLES,
) -> dict[str, MathScore]:
    """Run ``score_completions`` for each benchmark; every completion must belong to one of them."""
    owner = {
        problem.problem.problem_id: name for name, problems in sets.items() for problem in problems
    }
    by_set: dict[str, list[SavedCompletion]] = {name: [] for name in sets}
    for row in completions:
        if row.problem_id not in owner:
            raise ValueError(f"completion of problem {row.problem_id!r}, which is not in the data")
        by_set[owner[row.problem_id]].append(row)
    for name, rows in by_set.items():
        if not rows:
            raise ValueError(
                f"no completion of {name}, problem {sets[name][0].problem.problem_id!r} first"
            )
    return {
        name: score_completions(by_set[name], problems, ks, samples)
        for name, problems in sets.items()
    }


def average_estimates(
    scores: Mapping[str, MathScore], samples: int = DEFAULT_SAMPLES
) -> dict[str, Estimate]:
    """Return the plain mean over benchmarks of each metric that all of them have."""
    first = next(iter(scores.values()))
    estimates = {}
    for name in first.values:
        if all(name in score.values for score in scores.values()):
            groups = [list(score.values[name].values()) for score in scores.values()]
            estimates[name] = grouped_mean_estimate(groups, samples)
    return estimates
