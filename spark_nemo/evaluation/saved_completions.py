"""Saved completions of mathematics problems, and their score: one command grades them anew, without
a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spark_nemo.grammar import extract_boxed
from spark_nemo.utils.files import write_text_atomic

from .accuracy import GradedSample, greedy_values, majority_values, pass_at_k_values, problem_rates
from .answers import EvalProblem, judge_answers
from .bootstrap import DEFAULT_SAMPLES, Estimate, grouped_mean_estimate, mean_estimate
from .checker import AnswerGrade
from .reading import DataFileError, read_rows, required, required_id


@dataclass(frozen=True, slots=True)
class SavedCompletion:
    """One completion as it was sampled. ``sample`` counts the samples of a problem from 0, greedy
    ones apart.
    """

    problem_id: str
    sample: int
    greedy: bool
    text: str


@dataclass(frozen=True, slots=True)
class MathScore:
    """Values of each problem by name: ``greedy pass@1`` where there are greedy completions,
    ``avg@k`` and so on where sampled. ``estimates`` are their means with intervals; ``unjudged``
    counts answers that no checker could judge in time or without dying, which count as wrong.
    """

    problems: int
    values: dict[str, dict[str, float]]
    estimates: dict[str, Estimate]
    greedy: list[GradedSample]
    sampled: list[GradedSample]
    unjudged: int


def write_completions(path: str | Path, completions: Sequence[SavedCompletion]) -> None:
    """Write JSONL that ``read_completions`` reads."""
    write_text_atomic(
        path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in completions)
    )


def read_completions(path: str | Path) -> list[SavedCompletion]:
    """Read rows of ``problem_id``, ``text`` and optionally ``sample`` (0) and ``greedy`` (false).

    Raises ``DataFileError`` that names the file, line and field.
    """
    rows, seen = [], set()
    for place, row in read_rows(path):
        row = {"sample": 0, "greedy": False, **row}
        saved = SavedCompletion(
            required_id(place, row, "problem_id", "the problem's identifier"),
            required(place, row, "sample", int, "the sample's number, from 0"),
            required(place, row, "greedy", bool, "true or false"),
            required(place, row, "text", str, "the completion"),
        )
        if (key := (saved.problem_id, saved.sample, saved.greedy)) in seen:
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

    ``ks`` are the k of pass@k and maj@k; empty takes the powers of two up to the samples per
    problem, and that number itself. Raises ``ValueError`` for a completion of an unknown problem, a
    problem without completions, unequal numbers of samples, or a k beyond them.
    """
    keys = {problem.problem.problem_id: problem.answer for problem in problems}
    if unknown := [row.problem_id for row in completions if row.problem_id not in keys]:
        raise ValueError(f"completion of problem {unknown[0]!r}, which the data does not have")
    answers = [extract_boxed(row.text) for row in completions]
    judged = judge_answers(
        [(answer, keys[row.problem_id]) for answer, row in zip(answers, completions)]
    )
    greedy, sampled = [], []
    for row, judgement, answer in zip(completions, judged, answers):
        (greedy if row.greedy else sampled).append(
            GradedSample(row.problem_id, row.sample, judgement is AnswerGrade.EQUAL, answer)
        )
    for name, rows in (("greedy", greedy), ("sampled", sampled)):
        if rows and (missing := keys.keys() - {row.problem_id for row in rows}):
            raise ValueError(
                f"problem {min(missing)!r} has no {name} completion: a score needs every problem"
            )
    values: dict[str, dict[str, float]] = {"greedy pass@1": greedy_values(greedy)} if greedy else {}
    if sampled:
        count = len(sampled) // len(keys)
        values[f"avg@{count}"] = problem_rates(sampled)
        for k in ks or sorted({2**n for n in range(1, count.bit_length())} | {count} - {1}):
            values[f"pass@{k}"] = pass_at_k_values(sampled, k)
            values[f"maj@{k}"] = majority_values(sampled, k)
    return MathScore(
        len(keys),
        values,
        {name: mean_estimate(list(each.values()), samples) for name, each in values.items()},
        greedy,
        sampled,
        sum(judgement in (AnswerGrade.TIMEOUT, AnswerGrade.CRASHED) for judgement in judged),
    )


def score_sets(
    completions: Sequence[SavedCompletion],
    sets: Mapping[str, Sequence[EvalProblem]],
    ks: Sequence[int] = (),
    samples: int = DEFAULT_SAMPLES,
) -> dict[str, MathScore]:
    """``score_completions`` of each benchmark; every completion must belong to one of them."""
    owner = {
        problem.problem.problem_id: name for name, problems in sets.items() for problem in problems
    }
    parts: dict[str, list[SavedCompletion]] = {name: [] for name in sets}
    for row in completions:
        if row.problem_id not in owner:
            raise ValueError(
                f"completion of problem {row.problem_id!r}, which the data does not have"
            )
        parts[owner[row.problem_id]].append(row)
    for name, rows in parts.items():
        if not rows:
            raise ValueError(
                f"no completion of {name}, problem {sets[name][0].problem.problem_id!r} first"
            )
    return {
        name: score_completions(parts[name], problems, ks, samples)
        for name, problems in sets.items()
    }


def average_estimates(
    scores: Mapping[str, MathScore], samples: int = DEFAULT_SAMPLES
) -> dict[str, Estimate]:
    """The plain mean over benchmarks of each number that all of them have; problems are resampled
    within each.
    """
    shared = [
        name
        for name in next(iter(scores.values())).values
        if all(name in score.values for score in scores.values())
    ]
    return {
        name: grouped_mean_estimate(
            [list(score.values[name].values()) for score in scores.values()], samples
        )
        for name in shared
    }
