"""Accuracy on held-out problems from a table of graded samples, with bootstrap intervals over
problems.

Problems are the units that are resampled: samples of one problem are not independent of each other,
so resampling samples would make every interval too narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

from .answers import normalise_answer
from .bootstrap import DEFAULT_SAMPLES, Estimate, mean_difference, mean_estimate


@dataclass(frozen=True, slots=True)
class GradedSample:
    """One sampled answer: ``answer`` is None when the response had none, which is never correct."""

    problem_id: str
    sample: int
    correct: bool
    answer: str | None = None


def mean_accuracy(
    rows: Iterable[GradedSample], samples: int = DEFAULT_SAMPLES, seed: int = 0
) -> Estimate:
    """avg@k: the mean over problems of the share of right samples, every problem having the same k
    samples.
    """
    return _mean(problem_rates(rows), samples, seed)


def greedy_accuracy(
    rows: Iterable[GradedSample], samples: int = DEFAULT_SAMPLES, seed: int = 0
) -> Estimate:
    """Greedy pass@1. Raises ``ValueError`` unless there is exactly one sample per problem."""
    return _mean(greedy_values(rows), samples, seed)


def accuracy_difference(
    first: Iterable[GradedSample],
    second: Iterable[GradedSample],
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> Estimate:
    """avg@k of ``first`` minus avg@k of ``second``, paired by problem.

    Raises ``ValueError`` unless both cover the same problems.
    """
    rates, other = problem_rates(first), problem_rates(second)
    if rates.keys() != other.keys():
        raise ValueError(
            f"paired accuracies over different problems: {sorted(rates.keys() ^ other.keys())[:3]}, ..."
        )
    return mean_difference(
        list(rates.values()), [other[problem_id] for problem_id in rates], samples, seed
    )


def pass_at_k(
    rows: Iterable[GradedSample],
    k: int,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean over problems of ``pass_at_k_values``."""
    return _mean(pass_at_k_values(rows, k), samples, seed)


def majority_at_k(
    rows: Iterable[GradedSample],
    k: int,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> Estimate:
    """maj@k: the share of problems of which ``majority_values`` says True."""
    return _mean(majority_values(rows, k), samples, seed)


def problem_rates(rows: Iterable[GradedSample]) -> dict[str, float]:
    """Share of right samples by problem. Raises ``ValueError`` unless every problem has as many
    samples.
    """
    table = _by_problem(rows)
    if len({len(graded) for graded in table.values()}) > 1:
        raise ValueError("avg@k: every problem must have the same number of samples")
    return {
        problem_id: sum(s.correct for s in graded) / len(graded)
        for problem_id, graded in table.items()
    }


def greedy_values(rows: Iterable[GradedSample]) -> dict[str, bool]:
    """Whether each problem's greedy completion is right. Raises ``ValueError`` unless each has
    exactly one.
    """
    table = _by_problem(rows)
    for problem_id, graded in table.items():
        if len(graded) != 1:
            raise ValueError(
                f"problem {problem_id} has {len(graded)} greedy samples: greedy pass@1 takes one"
            )
    return {problem_id: graded[0].correct for problem_id, graded in table.items()}


def pass_at_k_values(rows: Iterable[GradedSample], k: int) -> dict[str, float]:
    """Chance that at least one of k samples is right, by problem, estimated without bias from n >=
    k samples.

    1 - C(n - c, k) / C(n, k) with c right of n samples (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    values = {}
    for problem_id, graded in _by_problem(rows).items():
        count, right = len(graded), sum(sample.correct for sample in graded)
        if not 1 <= k <= count:
            raise ValueError(f"pass@{k}: problem {problem_id} has {count} samples")
        values[problem_id] = 1 - comb(count - right, k) / comb(count, k)
    return values


def majority_values(rows: Iterable[GradedSample], k: int) -> dict[str, bool]:
    """Is the most frequent answer of a problem's first k samples right? By problem.

    Answers are grouped by ``normalise_answer``; samples without an answer do not vote; the answer
    seen first wins a tie; a problem on which nobody votes is wrong. Grouping is by text, so ``1/2``
    and ``0.5`` are two answers.
    """
    values = {}
    for problem_id, graded in _by_problem(rows).items():
        if not 1 <= k <= len(graded):
            raise ValueError(f"maj@{k}: problem {problem_id} has {len(graded)} samples")
        voters = [sample for sample in graded[:k] if sample.answer is not None]
        votes = Counter(normalise_answer(sample.answer) for sample in voters)
        winner = votes.most_common(1)[0][0] if votes else None
        values[problem_id] = next(
            (s.correct for s in voters if normalise_answer(s.answer) == winner), False
        )
    return values


def _mean(values: dict[str, float], samples: int, seed: int) -> Estimate:
    return mean_estimate(list(values.values()), samples, seed)


def _by_problem(rows: Iterable[GradedSample]) -> dict[str, Sequence[GradedSample]]:
    table: dict[str, list[GradedSample]] = {}
    for row in rows:
        table.setdefault(row.problem_id, []).append(row)
    for problem_id, graded in table.items():
        graded.sort(key=lambda sample: sample.sample)
        if len({sample.sample for sample in graded}) != len(graded):
            raise ValueError(f"problem {problem_id} has two samples with the same number")
    return table
