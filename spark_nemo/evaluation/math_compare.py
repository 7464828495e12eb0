"""Two runs on the same mathematics problems: differences with paired bootstrap intervals over
problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .answers import EvalProblem
from .bootstrap import DEFAULT_SAMPLES, Estimate, grouped_mean_estimate, mean_difference
from .reading import DataFileError
from .saved_completions import MathScore, SavedCompletion, read_completions, score_sets


@dataclass(frozen=True, slots=True)
class Difference:
    """``first`` minus ``second`` of one number on one benchmark (``average`` is the mean over
    benchmarks).
    """

    benchmark: str
    name: str
    first: float
    second: float
    difference: Estimate

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclass(frozen=True, slots=True)
class MathComparison:
    """The differences, the numbers that only one of the runs has, and how many answers of each
    nobody could judge.
    """

    differences: list[Difference]
    only_first: list[str]
    only_second: list[str]
    unjudged: tuple[int, int]


def compare_completions(
    first: str | Path,
    second: str | Path,
    sets: Mapping[str, Sequence[EvalProblem]],
    ks: Sequence[int] = (),
    samples: int = DEFAULT_SAMPLES,
) -> MathComparison:
    """Grade both files of completions and compare them problem by problem.

    A resample draws problems and takes what both runs made of them. avg@k estimates the same mean
    whatever k is, so avg@4 is compared with avg@32; every other number only with its equal. Raises
    ``DataFileError`` naming the first problem that only one file has, ``ValueError`` as
    ``score_sets`` does or when the files have no number in common.
    """
    runs = [read_completions(path) for path in (first, second)]
    _check_same_problems(first, second, *runs)
    scores = [score_sets(run, sets, ks, samples) for run in runs]
    tables = [{name: _by_kind(score) for name, score in each.items()} for each in scores]
    differences = []
    for benchmark in sets:
        a, b = (table[benchmark] for table in tables)
        differences += [
            _difference(benchmark, _label(kind, a, b), [a[kind][1]], [b[kind][1]], samples)
            for kind in a
            if kind in b
        ]
    kinds = [set.intersection(*(set(each) for each in table.values())) for table in tables]
    if not differences:
        raise ValueError(
            f"{first} and {second}: no number in common; one is greedy only, the other sampled only?"
        )
    if len(sets) > 1:
        every = [list(table.values()) for table in tables]
        differences += [
            _difference(
                "average",
                _label(kind, every[0][0], every[1][0]),
                [part[kind][1] for part in every[0]],
                [part[kind][1] for part in every[1]],
                samples,
            )
            for kind in every[0][0]
            if kind in kinds[0] & kinds[1]
        ]
    unjudged = tuple(sum(score.unjudged for score in each.values()) for each in scores)
    return MathComparison(
        differences, sorted(kinds[0] - kinds[1]), sorted(kinds[1] - kinds[0]), unjudged
    )


Values = dict[str, float]


def _by_kind(score: MathScore) -> dict[str, tuple[str, Values]]:
    """Name and values of each number by what it may be compared with."""
    return {
        "avg" if name.startswith("avg@") else name: (name, values)
        for name, values in score.values.items()
    }


def _label(kind: str, a: dict[str, tuple[str, Values]], b: dict[str, tuple[str, Values]]) -> str:
    return a[kind][0] if a[kind][0] == b[kind][0] else f"{a[kind][0]} / {b[kind][0]}"


def _difference(
    benchmark: str,
    name: str,
    first: Sequence[Values],
    second: Sequence[Values],
    samples: int,
) -> Difference:
    pairs = [
        ([a[problem_id] for problem_id in a], [b[problem_id] for problem_id in a])
        for a, b in zip(first, second)
    ]
    means = [
        sum(sum(pair[side]) / len(pair[side]) for pair in pairs) / len(pairs) for side in (0, 1)
    ]
    if len(pairs) == 1:
        estimate = mean_difference(*pairs[0], samples)
    else:
        estimate = grouped_mean_estimate(
            [[x - y for x, y in zip(*pair)] for pair in pairs], samples
        )
    return Difference(benchmark, name, *means, estimate)


def _check_same_problems(
    first: str | Path,
    second: str | Path,
    a: Sequence[SavedCompletion],
    b: Sequence[SavedCompletion],
) -> None:
    known = [{row.problem_id for row in rows} for rows in (a, b)]
    for path, rows, other in ((first, a, known[1]), (second, b, known[0])):
        if missing := next((row.problem_id for row in rows if row.problem_id not in other), None):
            raise DataFileError(
                f"{first} and {second} are about different problems: {missing!r} is only in {path}"
            )
