"""Percentile bootstrap intervals (Efron 1979), vectorised and seeded.

An interval shows how far a number might have moved with other problems or cases from the same
source. It does not cover training again with another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

DEFAULT_SAMPLES = 2000
_CHUNK_ELEMENTS = 4_000_000


class Estimate(NamedTuple):
    """A value and the ends of its interval (95% by default)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Hits:
    """Exact predictions on a split: one flag per case with an error, one per case without."""

    error: NDArray[np.bool_]
    correct: NDArray[np.bool_]


def mean_estimate(
    values: ArrayLike,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return the mean of ``values`` with its interval; raises ``ValueError`` without values."""
    values = _checked(values, "values")
    return ratio_estimate(values, np.ones_like(values), samples, seed, level)


def mean_difference(
    first: ArrayLike,
    second: ArrayLike,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return mean(first) - mean(second) with its interval.

    The values are paired by position: a resample takes both values of a pair or neither.
    """
    first = _checked(first, "first")
    second = _checked(second, "second")
    if first.shape != second.shape:
        raise ValueError(
            f"paired bootstrap of {len(first)} and {len(second)} values: the cases must be the same"
        )
    return mean_estimate(first - second, samples, seed, level)


def grouped_mean_estimate(
    groups: Sequence[ArrayLike],
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return the plain mean of the groups' means, whatever their sizes; resamples within groups."""
    if not groups:
        raise ValueError("bootstrap: mean of no groups")
    rng = np.random.default_rng(seed)
    means = []
    replicates = []
    for group in groups:
        array = _checked(group, "group")
        count = len(array)
        means.append(array.mean())
        replicates.append([array[rng.integers(count, size=count)].mean() for _ in range(samples)])
    return _estimate(float(np.mean(means)), np.mean(replicates, axis=0), level)


def ratio_estimate(
    numerators: ArrayLike,
    denominators: ArrayLike,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return sum(numerators) / sum(denominators), resampling units with their two numbers.

    An example is the share of correct steps, resampling solutions. Raises ``ValueError`` without
    units or for a denominator that is not positive.
    """
    numerators = _checked(numerators, "numerators")
    denominators = _checked(denominators, "denominators")
    if numerators.shape != denominators.shape or not np.all(denominators > 0):
        raise ValueError("every unit needs one numerator and one positive denominator")
    count = len(numerators)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // count)
    replicates = []
    for start in range(0, samples, chunk):
        drawn = rng.integers(count, size=(min(chunk, samples - start), count))
        replicates.append(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    value = numerators.sum() / denominators.sum()
    return _estimate(float(value), np.concatenate(replicates), level)


def f1_estimate(
    splits: Sequence[Hits],
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return the mean F1 over splits, resampling cases within each split and kind of case."""
    # Within the kind, so that both accuracies stay defined in every resample.
    _check_splits(splits)
    rng = np.random.default_rng(seed)
    replicates = []
    for split in splits:
        error_rates = _resampled_rates(rng, split.error, samples)
        correct_rates = _resampled_rates(rng, split.correct, samples)
        replicates.append(_f1(error_rates, correct_rates))
    return _estimate(_mean_f1(splits), np.mean(replicates, axis=0), level)


def f1_difference(
    first: Sequence[Hits],
    second: Sequence[Hits],
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return mean F1 of ``first`` minus mean F1 of ``second`` over the same cases in one order.

    Paired: a resample draws cases together with both models' results.
    """
    _check_splits(first)
    _check_splits(second)
    if [_sizes(split) for split in first] != [_sizes(split) for split in second]:
        raise ValueError(
            "paired bootstrap of two F1s: both models must have predicted the same cases"
        )
    rng = np.random.default_rng(seed)
    differences = []
    for a, b in zip(first, second):
        error_a, error_b = _resampled_pairs(rng, a.error, b.error, samples)
        correct_a, correct_b = _resampled_pairs(rng, a.correct, b.correct, samples)
        differences.append(_f1(error_a, correct_a) - _f1(error_b, correct_b))
    return _estimate(_mean_f1(first) - _mean_f1(second), np.mean(differences, axis=0), level)


def _resampled_rates(
    rng: np.random.Generator, hits: NDArray[np.bool_], samples: int
) -> NDArray[np.float64]:
    return rng.binomial(len(hits), hits.mean(), size=samples) / len(hits)


def _resampled_pairs(
    rng: np.random.Generator,
    a: NDArray[np.bool_],
    b: NDArray[np.bool_],
    samples: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # Hits and misses of two models: drawing cases is a multinomial draw over the four outcomes.
    cells = np.bincount(2 * a.astype(int) + b.astype(int), minlength=4)
    drawn = rng.multinomial(len(a), cells / len(a), size=samples)
    return (drawn[:, 2] + drawn[:, 3]) / len(a), (drawn[:, 1] + drawn[:, 3]) / len(a)


def _f1(acc_error: NDArray[np.float64], acc_correct: NDArray[np.float64]) -> NDArray[np.float64]:
    total = acc_error + acc_correct
    return np.divide(2 * acc_error * acc_correct, total, out=np.zeros_like(total), where=total > 0)


def _mean_f1(splits: Sequence[Hits]) -> float:
    scores = [
        _f1(split.error.mean(keepdims=True), split.correct.mean(keepdims=True)) for split in splits
    ]
    return float(np.mean(scores))


def _sizes(split: Hits) -> tuple[int, int]:
    return len(split.error), len(split.correct)


def _check_splits(splits: Sequence[Hits]) -> None:
    if not splits or any(min(_sizes(split)) == 0 for split in splits):
        raise ValueError(
            "F1 needs at least one split, each with cases with an error and cases without"
        )


def _checked(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"bootstrap: {name} must be a non-empty list of finite numbers")
    return array


def _estimate(value: float, replicates: NDArray[np.float64], level: float) -> Estimate:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be strictly between 0 and 1")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))
