"""docs/results.md: a row per seed of the toy task's pipeline, and the mean over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spark_nemo.report.display_names import (
    SHORT_NAMES,
    ordered_rl_variants,
    rl_variant_name,
    words,
)
from spark_nemo.report.student_interval import mean_and_half_width
from spark_nemo.report.summary import Summary, SummaryError, read_summary
from studies.document_sections import markdown_table, produced_by

_NOT_SHOWN = """\
What this does not show:

- The intervals in the rows of single seeds come from resampling the cases of that run. Only the
  last row covers training again.
- The gain in F1 is paired over the same cases of one run. With few seeds the interval over seeds
  is wide, and it is the one to quote.
- Nothing here tells how the method does with other models, on other problems, or for longer
  training.
- A dash means that the stage was not run. It does not mean zero."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table over seeds: its value in a run, and the interval of that value."""

    name: str
    value: Callable[[Summary], float | None]
    show: Callable[[float], str]
    interval: Callable[[Summary], tuple[float, float] | None] | None = None


def results_markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return docs/results.md from summaries of runs that differ in their seed only.

    F1 and accuracy are times 100. The last row of each table is the mean with, from two seeds on,
    the half-width of Student's 95% interval over seeds. Raises ``SummaryError`` without summaries
    or when two of them share a seed.
    """
    runs = [read_summary(summary) for summary in summaries]
    if not runs:
        raise SummaryError("results need at least one summary")
    seeds = [tuple(run.seeds) for run in runs]
    if len(set(seeds)) != len(seeds):
        raise SummaryError(f"two summaries have the same seeds {seeds}: they would count twice")
    over = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
    parts = [
        f"# The toy task over {over}",
        _commands(runs),
        "## Reward models: F1 by label method",
        _table(runs, _f1_columns()),
        "## Policies: held-out problems solved",
        _table(runs, _policy_columns(runs)),
        "## Seconds of work by stage (parallel jobs are added up)",
        _table(runs, _seconds_columns(runs)),
        _NOT_SHOWN,
    ]
    return "\n\n".join(parts) + "\n"


def _commands(runs: Sequence[Summary]) -> str:
    commands = list(dict.fromkeys(command for run in runs for command in run.commands))
    if not commands:
        return "The runs did not record the commands that produced them."
    return produced_by(commands)


def _f1_columns() -> list[Column]:
    def f1_of(method: str) -> Callable[[Summary], float | None]:
        return lambda run: run.stage2.f1.get(method) if run.stage2 else None

    def gain(run: Summary) -> float | None:
        f1 = run.stage2.f1 if run.stage2 else {}
        if "step_consistency" not in f1 or "single" not in f1:
            return None
        return f1["step_consistency"] - f1["single"]

    def gain_interval(run: Summary) -> tuple[float, float] | None:
        return run.stage2.f1_gain_interval if run.stage2 else None

    methods = ("single", "outcome_consistency", "step_consistency")
    columns = [Column(words(method), f1_of(method), _percent) for method in methods]
    columns.append(Column("gain of step consistency over single", gain, _signed, gain_interval))
    return columns


def _policy_columns(runs: Sequence[Summary]) -> list[Column]:
    def accuracy_of(key: str) -> Callable[[Summary], float | None]:
        return lambda run: run.stage3.accuracy.get(key) if run.stage3 else None

    def interval_of(key: str) -> Callable[[Summary], tuple[float, float] | None]:
        return lambda run: run.stage3.accuracy_intervals.get(key) if run.stage3 else None

    found = [key for run in runs if run.stage3 for key in run.stage3.accuracy]
    columns = []
    for key in ordered_rl_variants(["base", "spark", "rlvr", *found]):
        name = SHORT_NAMES.get(key, rl_variant_name(key))
        if key == "rlvr":
            name += " (reads answer keys)"
        columns.append(Column(name, accuracy_of(key), _percent, interval_of(key)))
    return columns


def _seconds_columns(runs: Sequence[Summary]) -> list[Column]:
    def seconds_of(stage: str) -> Callable[[Summary], float | None]:
        return lambda run: run.seconds.get(stage)

    def total(run: Summary) -> float | None:
        return sum(run.seconds.values()) if run.seconds else None

    stages = dict.fromkeys(stage for run in runs for stage in run.seconds)
    columns = [Column(words(stage), seconds_of(stage), _whole) for stage in stages]
    return [*columns, Column("all", total, _whole)]


def _table(runs: Sequence[Summary], columns: Sequence[Column]) -> str:
    rows = []
    for run in runs:
        seed = ", ".join(map(str, run.seeds)) or "–"
        rows.append([seed, *(_seed_cell(run, column) for column in columns)])
    rows.append([f"**mean of {len(runs)}**", *(_mean_cell(runs, column) for column in columns)])
    return markdown_table(["seed", *(column.name for column in columns)], rows)


def _seed_cell(run: Summary, column: Column) -> str:
    value = column.value(run)
    if value is None:
        return "–"
    interval = column.interval(run) if column.interval else None
    if interval is None:
        return column.show(value)
    low, high = interval
    return f"{column.show(value)} [{column.show(low)}, {column.show(high)}]"


def _mean_cell(runs: Sequence[Summary], column: Column) -> str:
    values = [column.value(run) for run in runs]
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, half = mean_and_half_width(known)
    text = column.show(mean)
    if half is not None:
        text += f" ± {column.show(half).lstrip('+')}"
    if len(known) < len(runs):
        text += f" ({len(known)} runs)"
    return text


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"
