"""Compare runs over seeds: means, intervals, and a verdict for every pair.

A pair differs only when the interval of its difference excludes 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spark_nemo.utils.files import write_text_atomic

from .charts import Series, Style, legend_mark, line_chart, percent
from .display_names import method_name, rl_variant_name
from .page import SUMMARY_FILE, template_environment
from .student_interval import mean_and_half_width
from .summary import CurvePoint, Summary, SummaryError, read_summary

Seed = tuple[int, ...]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#332288", "#000000")
_MARKERS = ("circle", "square", "triangle")
_DASHES = ("", "7 4", "2 3", "10 3 2 3")

F1_FAMILY = "Reward models: ProcessBench F1"
WHOLE_SOLUTION_FAMILY = (
    "Reward models: Yes or No about whole solutions, harmonic mean of two accuracies"
)
POLICY_FAMILY = "Policies: held-out problems solved"

NOTES = (
    "Intervals are Student's 95% over seeds. A pair is compared seed by seed, over the seeds that "
    "both have.",
    "“Does not differ” means that these seeds do not show a difference. It does not mean that "
    "there is none.",
    "Of twenty pairs without any difference, one is expected to be marked “differs” by chance.",
    "A dash means that there is only one seed, which says nothing about training again.",
)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that several seeds have, as fractions by seed; compared within its ``family``."""

    family: str
    name: str
    values: dict[Seed, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """First minus second over ``seeds`` shared seeds; ``half`` is None with fewer than two."""

    family: str
    first: str
    second: str
    seeds: int
    mean: float
    half: float | None

    @property
    def verdict(self) -> str:
        """``differs`` if the interval excludes 0; a dash without an interval."""
        if self.half is None:
            return "–"
        return "differs" if abs(self.mean) > self.half else "does not differ"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All quantities, all pairs within a family, and the runs behind them."""

    runs: list[tuple[str, Summary]]
    quantities: list[Quantity]
    pairs: list[Pair]

    @property
    def families(self) -> list[str]:
        """Families in the order of their first quantity."""
        return list(dict.fromkeys(quantity.family for quantity in self.quantities))


def read_runs(arguments: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Read ``(group, summary)`` of run folders, each given as ``FOLDER`` or ``GROUP=FOLDER``.

    Raises ``SummaryError`` that names a file which is missing or is not JSON.
    """
    runs = []
    for argument in arguments:
        group, equals, folder = argument.partition("=")
        if not equals or Path(argument).exists():
            group = ""
            folder = argument
        path = Path(folder) / SUMMARY_FILE
        try:
            runs.append((group, json.loads(path.read_text(encoding="utf-8"))))
        except OSError as error:
            raise SummaryError(
                f"{path}: cannot be read ({error.strerror}); `spark-nemo report` writes it"
            ) from error
        except ValueError as error:
            raise SummaryError(f"{path}: not valid JSON ({error})") from error
    return runs


def compare_runs(summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> Comparison:
    """Compare reward models' F1 and policies' accuracy pairwise over the seeds of each group.

    Raises ``SummaryError`` without runs, or when two runs of one group share a seed.
    """
    runs = [(group, read_summary(summary)) for group, summary in summaries]
    if not runs:
        raise SummaryError("nothing to compare: name run folders with a summary.json")
    seen: set[tuple[str, Seed]] = set()
    found: dict[tuple[str, str], dict[Seed, float]] = {}
    for group, run in runs:
        seed = tuple(run.seeds)
        if (group, seed) in seen:
            in_group = f" of {group}" if group else ""
            raise SummaryError(
                f"two runs{in_group} have the seed {list(seed)} and would count twice; "
                "name their groups, as in new=runs/a old=runs/b"
            )
        seen.add((group, seed))
        for family, name, value in _values(run):
            found.setdefault((family, _in_group(group, name)), {})[seed] = value
    quantities = [Quantity(family, name, values) for (family, name), values in found.items()]
    pairs = []
    for first, second in combinations(quantities, 2):
        if first.family == second.family:
            pair = _pair(first, second)
            if pair is not None:
                pairs.append(pair)
    return Comparison(runs, quantities, pairs)


def comparison_markdown(comparison: Comparison) -> str:
    """Return two tables per family, times 100."""
    parts = ["# Comparison over seeds"]
    for family in comparison.families:
        rows = [["", "mean", "95% interval", "seeds"]]
        for quantity in comparison.quantities:
            if quantity.family == family:
                rows.append([quantity.name, *quantity_cells(quantity)])
        pairs = [["first", "second", "first − second", "95% interval", "seeds", "verdict"]]
        for pair in comparison.pairs:
            if pair.family == family:
                pairs.append([pair.first, pair.second, *pair_cells(pair), pair.verdict])
        parts += [f"## {family}", _table(rows)]
        if len(pairs) > 1:
            parts.append(_table(pairs))
    parts.append("\n".join(f"- {note}" for note in NOTES))
    return "\n\n".join(parts) + "\n"


def comparison_page(comparison: Comparison) -> str:
    """Return the tables and the RL curves with bands as one self-contained HTML file."""
    environment = template_environment(quantity_cells=quantity_cells, pair_cells=pair_cells)
    return environment.get_template("seed_comparison.html.j2").render(
        comparison=comparison, charts=_charts(comparison), notes=NOTES
    )


def write_comparison(folder: str | Path, comparison: Comparison) -> Path:
    """Write ``compare.md`` and ``compare.html`` into ``folder``; return the page's path."""
    folder = Path(folder)
    page = comparison_page(comparison)
    write_text_atomic(folder / "compare.md", comparison_markdown(comparison))
    write_text_atomic(folder / "compare.html", page)
    return folder / "compare.html"


def quantity_cells(quantity: Quantity) -> list[str]:
    """Return mean, interval and number of seeds as the cells of a table."""
    mean, half = mean_and_half_width(list(quantity.values.values()))
    return [*_mean_cells(mean, half, percent), str(len(quantity.values))]


def pair_cells(pair: Pair) -> list[str]:
    """Return mean difference, interval and number of seeds as the cells of a table."""
    return [*_mean_cells(pair.mean, pair.half, _signed_percent), str(pair.seeds)]


def _mean_cells(mean: float, half: float | None, show: Callable[[float], str]) -> list[str]:
    interval = "–" if half is None else f"[{show(mean - half)}, {show(mean + half)}]"
    return [cell.replace("-", "\N{MINUS SIGN}") for cell in (show(mean), interval)]


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.1f}"


def _values(run: Summary) -> list[tuple[str, str, float]]:
    """Return ``(family, name, value)`` of every quantity of a run."""
    values = []
    if run.stage2:
        for name, f1 in run.stage2.f1.items():
            values.append((F1_FAMILY, method_name(name), f1))
        for name, scores in run.stage2.whole_solutions.items():
            value = scores.verdict_harmonic_mean.value
            values.append((WHOLE_SOLUTION_FAMILY, method_name(name), value))
    if run.stage3:
        for name, accuracy in run.stage3.accuracy.items():
            values.append((POLICY_FAMILY, rl_variant_name(name), accuracy))
    return values


def _pair(first: Quantity, second: Quantity) -> Pair | None:
    differences = [
        value - second.values[seed] for seed, value in first.values.items() if seed in second.values
    ]
    if not differences:
        return None
    mean, half = mean_and_half_width(differences)
    return Pair(first.family, first.name, second.name, len(differences), mean, half)


def _charts(comparison: Comparison) -> list[tuple[str, Markup, list[tuple[str, Markup]]]]:
    """Return ``(title, chart, legend)`` of each quantity that some curve has."""

    def true_accuracy(point: CurvePoint) -> float | None:
        return point.true_accuracy

    def reward(point: CurvePoint) -> float | None:
        return point.reward

    charts = []
    for title, label, value in (
        ("Problems solved, out of 100", "problems solved", true_accuracy),
        ("Mean reward, times 100", "mean reward", reward),
    ):
        curves = _curves(comparison, value)
        series = [_banded(name, index, lines) for index, (name, lines) in enumerate(curves.items())]
        series = [line for line in series if line.points]
        if series:
            chart = line_chart(series, "RL step", label, f"{label} by RL step, with 95% bands")
            legend = [(line.name, legend_mark(line.style)) for line in series]
            charts.append((title, chart, legend))
    return charts


def _curves(
    comparison: Comparison, value: Callable[[CurvePoint], float | None]
) -> dict[str, list[dict[int, float]]]:
    """Return every seed's values by step, for each RL variant in each group."""
    curves: dict[str, list[dict[int, float]]] = {}
    for group, run in comparison.runs:
        if run.stage3 is None:
            continue
        for rl_variant, points in run.stage3.curves.items():
            line = {point.step: value(point) for point in points if value(point) is not None}
            if line:
                name = _in_group(group, rl_variant_name(rl_variant))
                curves.setdefault(name, []).append(line)
    return curves


def _banded(name: str, index: int, lines: Sequence[dict[int, float]]) -> Series:
    """Return the mean over seeds with its interval as a band."""
    style = Style(
        _COLOURS[index % len(_COLOURS)],
        _MARKERS[index % len(_MARKERS)],
        _DASHES[index % len(_DASHES)],
    )
    # Only steps that every seed has: at others the seeds behind the mean would change.
    points = []
    band = []
    for step in sorted(set.intersection(*(set(line) for line in lines))):
        mean, half = mean_and_half_width([line[step] for line in lines])
        points.append((step, mean))
        if half is not None:
            band.append((step, mean - half, mean + half))
    return Series(name, style, points, band)


def _in_group(group: str, name: str) -> str:
    return f"{group}: {name}" if group else name


def _table(rows: Sequence[Sequence[str]]) -> str:
    header = rows[0]
    lines = [header, ["---"] * len(header), *rows[1:]]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
