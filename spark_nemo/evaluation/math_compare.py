"""Compare two runs on the same mathematics problems, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.records.rows import DataFileError

from .answers import EvalProblem
from .bootstrap import DEFAULT_SAMPLES, Estimate, grouped_mean_estimate, mean_difference
from .saved_completions import MathScore, SavedCompletion, read_completions, score_sets

Values = dict[str, float]
"""One metric's value by problem."""
Metrics = dict[str, tuple[str, Values]]
"""A benchmark's metrics by the kind that decides what they are compared with: name and values."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of ``first`` minus ``second`` on a benchmark, or ``average`` over benchmarks."""

    benchmark: str
    name: str
    first: float
    second: float
    difference: Estimate

    @property
    def differs(self) -> bool:
        """True if the interval excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclass(frozen=True, slots=True)
class MathComparison:
    """Differences, metrics of one run alone, and each run's number of ungraded answers."""

    differences: list[Difference]
    only_first: list[str]
    only_second: list[str]
    ungraded: tuple[int, int]


def compare_completions(
    first: str | Path,
    second: str | Path,
    sets: Mapping[str, Sequence[EvalProblem]],
    ks: Sequence[int] = (),
    samples: int = DEFAULT_SAMPLES,
) -> MathComparison:
    """Grade two files of completions and compare them problem by problem.

    A resample draws problems together with both runs' results. avg@k estimates the same mean
    whatever k is, so avg@4 is compared with avg@32; every other metric only with its equal. Raises
    ``DataFileError`` naming the first problem that only one file has, and ``ValueError`` as
    ``score_sets`` does or when the files have no metric in common.
    """
    first_rows = read_completions(first)
    second_rows = read_completions(second)
    _check_same_problems(first, second, first_rows, second_rows)
    first_scores = score_sets(first_rows, sets, ks, samples)
    second_scores = score_sets(second_rows, sets, ks, samples)
    first_metrics = [_by_kind(first_scores[benchmark]) for benchmark in sets]
    second_metrics = [_by_kind(second_scores[benchmark]) for benchmark in sets]

    differences = []
    for benchmark, a, b in zip(sets, first_metrics, second_metrics):
        differences += _differences(benchmark, [a], [b], samples)
    if not differences:
        raise ValueError(
            f"{first} and {second} have no metric in common; is one greedy only, the other sampled?"
        )
    if len(sets) > 1:
        differences += _differences("average", first_metrics, second_metrics, samples)
    first_kinds = _common_kinds(first_metrics)
    second_kinds = _common_kinds(second_metrics)
    return MathComparison(
        differences=differences,
        only_first=sorted(first_kinds - second_kinds),
        only_second=sorted(second_kinds - first_kinds),
        ungraded=(_num_ungraded(first_scores), _num_ungraded(second_scores)),
    )


def _by_kind(score: MathScore) -> Metrics:
    metrics = {}
    for name, values in score.values.items():
        kind = "avg" if name.startswith("avg@") else name
        metrics[kind] = (name, values)
    return metrics


def _common_kinds(tables: Sequence[Metrics]) -> set[str]:
    """Return the kinds of metrics that all benchmarks of a run have."""
    return set.intersection(*(set(table) for table in tables))


def _num_ungraded(scores: Mapping[str, MathScore]) -> int:
    return sum(score.ungraded for score in scores.values())


def _differences(
    benchmark: str, first: Sequence[Metrics], second: Sequence[Metrics], samples: int
) -> list[Difference]:
    """Compare the metrics that all given benchmarks of both runs have; means weigh them alike."""
    common = _common_kinds(first) & _common_kinds(second)
    differences = []
    for kind in first[0]:
        if kind not in common:
            continue
        name = first[0][kind][0]
        other_name = second[0][kind][0]
        differences.append(
            _difference(
                benchmark,
                name if name == other_name else f"{name} / {other_name}",
                [metrics[kind][1] for metrics in first],
                [metrics[kind][1] for metrics in second],
                samples,
            )
        )
    return differences


def _difference(
    benchmark: str, name: str, first: Sequence[Values], second: Sequence[Values], samples: int
) -> Difference:
    # Rows of the second run in the order of the first, so that values are paired by problem.
    firsts = [list(values.values()) for values in first]
    seconds = [[b[problem_id] for problem_id in a] for a, b in zip(first, second)]
    if len(firsts) == 1:
        estimate = mean_difference(firsts[0], seconds[0], samples)
    else:
        gaps = [[x - y for x, y in zip(a, b)] for a, b in zip(firsts, seconds)]
        estimate = grouped_mean_estimate(gaps, samples)
    return Difference(benchmark, name, _mean_of_means(firsts), _mean_of_means(seconds), estimate)


def _mean_of_means(groups: Sequence[Sequence[float]]) -> float:
    return sum(sum(group) / len(group) for group in groups) / len(groups)


def _check_same_problems(
    first: str | Path,
    second: str | Path,
    first_rows: Sequence[SavedCompletion],
    second_rows: Sequence[SavedCompletion],
) -> None:
    first_ids = dict.fromkeys(row.problem_id for row in first_rows)
    second_ids = dict.fromkeys(row.problem_id for row in second_rows)
    for path, ids, others in ((first, first_ids, second_ids), (second, second_ids, first_ids)):
        for problem_id in ids:
            if problem_id not in others:
                raise DataFileError(
                    f"{first} and {second} are about different problems: {problem_id!r} is only "
                    f"in {path}"
                )
