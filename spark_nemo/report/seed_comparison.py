"""Runs against each other over seeds: means, intervals, and per pair a verdict that needs an
interval without 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from spark_nemo.utils.files import write_text_atomic

from .charts import Series, Style, legend_mark, line_chart, percent
from .display_names import arm_name, method_name
from .page import SUMMARY_FILE
from .student_interval import mean_and_half_width
from .summary import CurvePoint, Summary, SummaryError, read_summary

Seed = tuple[int, ...]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#332288", "#000000")
_MARKERS = ("circle", "square", "triangle")
_WHOLE_SOLUTIONS = "Reward models: Yes or No about whole solutions, harmonic mean of two accuracies"
_DASHES = ("", "7 4", "2 3", "10 3 2 3")

NOTES = (
    "Intervals are Student's 95% over seeds; a pair is compared seed by seed, over the seeds that both have.",
    "“Does not differ” means that these seeds do not show a difference, not that there is none.",
    "Of twenty pairs without any difference one is expected to be marked “differs” by chance.",
    "A dash means that there is one seed only, which says nothing about training again.",
)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that several seeds have: ``family`` is what may be compared, ``values`` are
    fractions by seed.
    """

    family: str
    name: str
    values: dict[Seed, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """First minus second over ``seeds`` shared seeds; ``half`` is the half-width of its interval,
    None below two.
    """

    family: str
    first: str
    second: str
    seeds: int
    mean: float
    half: float | None

    @property
    def verdict(self) -> str:
        """``differs`` only when the interval excludes 0; a dash where there is no interval."""
        if self.half is None:
            return "–"
        return "differs" if abs(self.mean) > self.half else "does not differ"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All quantities, all pairs within a family, and the runs behind them."""

    runs: list[tuple[str, Summary]]
    quantities: list[Quantity]
    pairs: list[Pair]


def read_runs(arguments: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """``(group, summary)`` of run folders, each written ``FOLDER`` or ``GROUP=FOLDER``.

    Raises ``SummaryError`` that names the file which is missing or is no summary.
    """
    runs = []
    for argument in arguments:
        group, equals, folder = argument.partition("=")
        if not equals or Path(argument).exists():
            group, folder = "", argument
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
    """Collect reward models' F1 and policies' accuracy over the seeds of each group, and compare
    them pairwise.

    Raises ``SummaryError`` without runs, or when two runs of one group share a seed: it would count
    twice.
    """
    runs = [(group, read_summary(summary)) for group, summary in summaries]
    if not runs:
        raise SummaryError("nothing to compare: name run folders with a summary.json")
    seen: set[tuple[str, Seed]] = set()
    found: dict[tuple[str, str], dict[Seed, float]] = {}
    for group, run in runs:
        seed = tuple(run.seeds)
        if (group, seed) in seen:
            raise SummaryError(
                f"two runs{f' of {group}' if group else ''} have the seed {list(seed)}: they would "
                "count twice; name their groups, as in new=runs/a old=runs/b"
            )
        seen.add((group, seed))
        for family, name, value in _values(run):
            found.setdefault((family, _named(group, name)), {})[seed] = value
    quantities = [Quantity(family, name, values) for (family, name), values in found.items()]
    return Comparison(
        runs,
        quantities,
        [
            pair
            for a, b in combinations(quantities, 2)
            if a.family == b.family and (pair := _pair(a, b))
        ],
    )


def comparison_markdown(comparison: Comparison) -> str:
    """Two tables per family, times 100."""
    parts = ["# Comparison over seeds"]
    for family in dict.fromkeys(quantity.family for quantity in comparison.quantities):
        rows = [["", "mean", "95% interval", "seeds"]] + [
            [
                q.name,
                *_mean_cells(*mean_and_half_width(list(q.values.values()))),
                str(len(q.values)),
            ]
            for q in comparison.quantities
            if q.family == family
        ]
        pairs = [["first", "second", "first − second", "95% interval", "seeds", "verdict"]] + [
            [p.first, p.second, *_mean_cells(p.mean, p.half, signed=True), str(p.seeds), p.verdict]
            for p in comparison.pairs
            if p.family == family
        ]
        parts += [f"## {family}", _table(rows)] + ([_table(pairs)] if len(pairs) > 1 else [])
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in NOTES)]) + "\n"


def comparison_page(comparison: Comparison) -> str:
    """The tables and the RL curves with bands as one HTML file that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spark_nemo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cells=lambda pair: _mean_cells(pair.mean, pair.half, signed=True))
    means = {
        id(q): _mean_cells(*mean_and_half_width(list(q.values.values())))
        for q in comparison.quantities
    }
    families = list(dict.fromkeys(q.family for q in comparison.quantities))
    return environment.get_template("seed_comparison.html.j2").render(
        comparison=comparison,
        families=families,
        means=means,
        id=id,
        charts=_charts(comparison),
        notes=NOTES,
    )


def write_comparison(folder: str | Path, comparison: Comparison) -> Path:
    """Write ``compare.md`` and ``compare.html`` into ``folder`` and return the page's path."""
    page = comparison_page(comparison)
    write_text_atomic(Path(folder) / "compare.md", comparison_markdown(comparison))
    write_text_atomic(Path(folder) / "compare.html", page)
    return Path(folder) / "compare.html"


def _values(run: Summary) -> list[tuple[str, str, float]]:
    values = []
    if run.stage2:
        values += [
            ("Reward models: ProcessBench F1", method_name(name), f1)
            for name, f1 in run.stage2.f1.items()
        ]
        values += [
            (_WHOLE_SOLUTIONS, method_name(name), scores.verdict_harmonic_mean.value)
            for name, scores in run.stage2.whole_solutions.items()
        ]
    if run.stage3:
        values += [
            ("Policies: held-out problems solved", arm_name(name), accuracy)
            for name, accuracy in run.stage3.accuracy.items()
        ]
    return values


def _pair(first: Quantity, second: Quantity) -> Pair | None:
    shared = [seed for seed in first.values if seed in second.values]
    if not shared:
        return None
    mean, half = mean_and_half_width([first.values[seed] - second.values[seed] for seed in shared])
    return Pair(first.family, first.name, second.name, len(shared), mean, half)


def _charts(comparison: Comparison) -> list[tuple[str, Markup, list[tuple[str, Markup]]]]:
    """``(title, chart, legend)`` of each quantity that some curve has."""
    charts = []
    chosen: list[tuple[str, str, Callable[[CurvePoint], float | None]]] = [
        ("Problems solved, out of 100", "problems solved", lambda point: point.true_accuracy),
        ("Mean reward, times 100", "mean reward", lambda point: point.reward),
    ]
    for title, label, value in chosen:
        curves: dict[str, list[dict[int, float]]] = {}
        for group, run in comparison.runs:
            for arm, points in (run.stage3.curves if run.stage3 else {}).items():
                line = {point.step: y for point in points if (y := value(point)) is not None}
                if line:
                    curves.setdefault(_named(group, arm_name(arm)), []).append(line)
        series = [_banded(name, index, lines) for index, (name, lines) in enumerate(curves.items())]
        series = [line for line in series if line.points]
        if series:
            charts.append(
                (
                    title,
                    line_chart(series, "RL step", label, f"{label} by RL step, with 95% bands"),
                    [(line.name, legend_mark(line.style)) for line in series],
                )
            )
    return charts


def _banded(name: str, index: int, lines: Sequence[dict[int, float]]) -> Series:
    """The mean over seeds with its interval, at the steps that every seed has: elsewhere the seeds
    behind it change.
    """
    style = Style(
        _COLOURS[index % len(_COLOURS)],
        _MARKERS[index % len(_MARKERS)],
        _DASHES[index % len(_DASHES)],
    )
    steps = sorted(set.intersection(*(set(line) for line in lines)))
    ends = [(step, *mean_and_half_width([line[step] for line in lines])) for step in steps]
    band = [(step, mean - half, mean + half) for step, mean, half in ends if half is not None]
    return Series(name, style, [(step, mean) for step, mean, _ in ends], band)


def _named(group: str, name: str) -> str:
    return f"{group}: {name}" if group else name


def _mean_cells(mean: float, half: float | None, signed: bool = False) -> tuple[str, str]:
    def show(value: float) -> str:
        return (f"{100 * value:+.1f}" if signed else percent(value)).replace("-", "\N{MINUS SIGN}")

    return show(mean), "–" if half is None else f"[{show(mean - half)}, {show(mean + half)}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"
        for row in rows
    )
