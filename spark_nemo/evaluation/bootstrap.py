"""Percentile bootstrap intervals (Efron 1979), vectorised and seeded.

An interval here says how far a number might have moved had other problems or cases been drawn from
the same source. It says nothing about training again with another seed.
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
    """A value and the ends of its interval (95% unless asked otherwise)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Hits:
    """Which cases of a ProcessBench split were predicted exactly: ``error`` of label >= 0,
    ``correct`` of label -1.
    """

    error: NDArray[np.bool_]
    correct: NDArray[np.bool_]


def mean_estimate(
    values: ArrayLike,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean of ``values`` with its bootstrap interval. Raises ``ValueError`` without values."""
    values = _checked(values, "values")
    return ratio_estimate(values, np.ones_like(values), samples, seed, level)


def mean_difference(
    first: ArrayLike,
    second: ArrayLike,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """mean(first) - mean(second) of values paired by position: a resample takes both values of a
    pair or neither.
    """
    first, second = _checked(first, "first"), _checked(second, "second")
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
    """The plain mean of the groups' means, as of benchmarks of different sizes; units are resampled
    within groups.
    """
    if not groups:
        raise ValueError("bootstrap: mean of no groups")
    arrays, rng = [_checked(group, "group") for group in groups], np.random.default_rng(seed)
    replicates = np.mean(
        [
            np.array(
                [array[rng.integers(len(array), size=len(array))].mean() for _ in range(samples)]
            )
            for array in arrays
        ],
        axis=0,
    )
    return _estimate(float(np.mean([array.mean() for array in arrays])), replicates, level)


def ratio_estimate(
    numerators: ArrayLike,
    denominators: ArrayLike,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """sum(numerators) / sum(denominators) over resampled units, e.g. right steps per step,
    resampling solutions.

    Raises ``ValueError`` without units or with a denominator that is not positive.
    """
    numerators, denominators = (
        _checked(numerators, "numerators"),
        _checked(denominators, "denominators"),
    )
    if numerators.shape != denominators.shape or not np.all(denominators > 0):
        raise ValueError("every unit needs one numerator and one positive denominator")
    count, rng = len(numerators), np.random.default_rng(seed)
    replicates = []
    for start in range(0, samples, chunk := max(1, _CHUNK_ELEMENTS // count)):
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
    """Mean F1 over splits. Cases are resampled within split and kind, so both accuracies stay
    defined.
    """
    _check_splits(splits)
    rng = np.random.default_rng(seed)
    replicates = np.mean(
        [
            _f1(
                _resampled_rates(rng, split.error, samples),
                _resampled_rates(rng, split.correct, samples),
            )
            for split in splits
        ],
        axis=0,
    )
    return _estimate(_average(splits), replicates, level)


def f1_difference(
    first: Sequence[Hits],
    second: Sequence[Hits],
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean F1 of ``first`` minus that of ``second`` over the same cases in the same order.

    Paired: a resample draws cases, and a case counts with what both models made of it. For hits and
    misses this is a multinomial draw over the four pairs of outcomes, which is how it is computed.
    """
    _check_splits(first)
    _check_splits(second)
    if [_sizes(split) for split in first] != [_sizes(split) for split in second]:
        raise ValueError(
            "paired bootstrap of two F1s: both models must have predicted the same cases of every split"
        )
    rng = np.random.default_rng(seed)
    differences = []
    for a, b in zip(first, second):
        error_a, error_b = _resampled_pairs(rng, a.error, b.error, samples)
        correct_a, correct_b = _resampled_pairs(rng, a.correct, b.correct, samples)
        differences.append(_f1(error_a, correct_a) - _f1(error_b, correct_b))
    return _estimate(_average(first) - _average(second), np.mean(differences, axis=0), level)


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
    cells = np.bincount(2 * a.astype(int) + b.astype(int), minlength=4)
    drawn = rng.multinomial(len(a), cells / len(a), size=samples)
    return (drawn[:, 2] + drawn[:, 3]) / len(a), (drawn[:, 1] + drawn[:, 3]) / len(a)


def _f1(acc_error: NDArray[np.float64], acc_correct: NDArray[np.float64]) -> NDArray[np.float64]:
    total = acc_error + acc_correct
    return np.divide(2 * acc_error * acc_correct, total, out=np.zeros_like(total), where=total > 0)


def _average(splits: Sequence[Hits]) -> float:
    return float(
        np.mean(
            [
                _f1(split.error.mean(keepdims=True), split.correct.mean(keepdims=True))
                for split in splits
            ]
        )
    )


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
        raise ValueError(f"level={level}: must lie strictly between 0 and 1")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))
