"""Accuracy on held-out problems, from a table of graded samples.

All functions return one value per problem. Intervals resample problems, not samples: samples of
one problem are not independent, so resampling them would make every interval too narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

from spark_nemo.grammar import normalize_answer

from .bootstrap import DEFAULT_SAMPLES, Estimate, mean_estimate


@dataclass(frozen=True, slots=True)
class GradedSample:
    """One sampled answer; ``answer`` is None when the response had none, which is never correct."""

    problem_id: str
    sample: int
    correct: bool
    answer: str | None = None


def mean_accuracy(
    rows: Iterable[GradedSample], samples: int = DEFAULT_SAMPLES, seed: int = 0
) -> Estimate:
    """Return avg@k with its interval: the mean over problems of ``problem_rates``."""
    return mean_estimate(list(problem_rates(rows).values()), samples, seed)


def problem_rates(rows: Iterable[GradedSample]) -> dict[str, float]:
    """Return the share of correct samples by problem.

    Raises ``ValueError`` when problems have different numbers of samples.
    """
    table = _by_problem(rows)
    if len({len(graded) for graded in table.values()}) > 1:
        raise ValueError("avg@k: every problem must have the same number of samples")
    rates = {}
    for problem_id, graded in table.items():
        rates[problem_id] = sum(sample.correct for sample in graded) / len(graded)
    return rates


def greedy_values(rows: Iterable[GradedSample]) -> dict[str, bool]:
    """Return whether each problem's greedy completion is correct.

    Raises ``ValueError`` for a problem with more than one greedy completion.
    """
    table = _by_problem(rows)
    for problem_id, graded in table.items():
        if len(graded) != 1:
            raise ValueError(
                f"problem {problem_id} has {len(graded)} greedy samples: greedy pass@1 takes one"
            )
    return {problem_id: graded[0].correct for problem_id, graded in table.items()}


def pass_at_k_values(rows: Iterable[GradedSample], k: int) -> dict[str, float]:
    """Return an unbiased estimate, by problem, of the chance that one of k samples is correct.

    1 - C(n - c, k) / C(n, k) with c correct of n >= k samples (Chen et al. 2021, arXiv 2107.03374,
    eq. 1).
    """
    values = {}
    for problem_id, graded in _by_problem(rows).items():
        count = len(graded)
        correct = sum(sample.correct for sample in graded)
        if not 1 <= k <= count:
            raise ValueError(f"pass@{k}: problem {problem_id} has {count} samples")
        values[problem_id] = 1 - comb(count - correct, k) / comb(count, k)
    return values


def majority_values(rows: Iterable[GradedSample], k: int) -> dict[str, bool]:
    """Return whether the most frequent answer of each problem's first k samples is correct.

    Answers are grouped by ``normalize_answer``, that is by text: ``1/2`` and ``0.5`` are two
    answers. Samples without an answer do not vote, the answer seen first wins a tie, and a problem
    without votes is wrong.
    """
    values = {}
    for problem_id, graded in _by_problem(rows).items():
        if not 1 <= k <= len(graded):
            raise ValueError(f"maj@{k}: problem {problem_id} has {len(graded)} samples")
        votes: Counter[str] = Counter()
        correct_by_answer: dict[str, bool] = {}
        for sample in graded[:k]:
            if sample.answer is not None:
                answer = normalize_answer(sample.answer)
                votes[answer] += 1
                correct_by_answer.setdefault(answer, sample.correct)
        if votes:
            winner = votes.most_common(1)[0][0]
            values[problem_id] = correct_by_answer[winner]
        else:
            values[problem_id] = False
    return values


def _by_problem(rows: Iterable[GradedSample]) -> dict[str, Sequence[GradedSample]]:
    table: dict[str, list[GradedSample]] = {}
    for row in rows:
        table.setdefault(row.problem_id, []).append(row)
    for problem_id, graded in table.items():
        graded.sort(key=lambda sample: sample.sample)
        if len({sample.sample for sample in graded}) != len(graded):
            raise ValueError(f"problem {problem_id} has two samples with the same number")
    return table
