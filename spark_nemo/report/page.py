"""Render a run's report: one HTML file without scripts, fonts or images from elsewhere.

The page's text is in the template ``report.html.j2``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from spark_nemo.utils.files import write_json_atomic, write_text_atomic
from spark_nemo.verification.label_filter import REASONS

from .charts import (
    WIDTH,
    Bar,
    Series,
    Style,
    interval_chart,
    legend_mark,
    line_chart,
    percent,
    percent_tick,
)
from .display_names import (
    METHOD_NAMES,
    difference_name,
    method_name,
    ordered_rl_variants,
    rl_variant_name,
    words,
)
from .hacking_view import hacking_views
from .summary import (
    CurvePoint,
    Figure,
    Stage1Summary,
    Stage2Summary,
    Stage3Summary,
    Summary,
    read_summary,
    to_plain,
)

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"

FAILURE_NAMES = {
    "parse_failure": "Unreadable verifications",
    "truncated": "Cut off at the token limit",
    "engine_error": "Engine errors",
    "format_violation": "Solutions out of format",
}
STAGE_NAMES = {"stage1": "Stage I", "stage2": "Stage II", "stage3": "Stage III"}

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREY = "#5F6B7A"
PURPLE = "#AA4499"
STYLES = {
    "single": Style(GREY, "triangle", "2 3"),
    "outcome_consistency": Style(PURPLE, "square", "7 4"),
    "step_consistency": Style(BLUE, "circle"),
    "base": Style(GREY, "triangle", "2 3"),
    "spark": Style(BLUE, "circle"),
    "rlvr": Style(VERMILION, "square", "7 4"),
}
_OTHER_STYLES = [
    Style(colour, shape, dash)
    for shape, dash in (("square", "4 3"), ("triangle", "8 3 2 3"), ("circle", "1 3"))
    for colour in ("#332288", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
]
SMALL_WIDTH = 330


def write_report(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json`` and ``report.html`` into ``folder``; return the page's path.

    Raises ``SummaryError`` for an invalid summary, before anything is written.
    """
    plain = to_plain(read_summary(summary))
    page = report_page(plain)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / SUMMARY_FILE, plain)
    write_text_atomic(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def report_page(summary: Mapping[str, Any]) -> str:
    """Render the page of a summary given as a plain dict; raises ``SummaryError``."""
    run = read_summary(summary)
    rl_variants = _rl_variants(run)

    def legend_key(name: str) -> Markup:
        return legend_mark(_style(name, rl_variants))

    environment = template_environment(
        pct=percent,
        interval=_interval,
        signed=_signed,
        duration=_duration,
        count=_count,
        words=words,
        difference=difference_name,
        stage=_stage_name,
        failure=_failure_name,
        method=method_name,
        rl_variant=rl_variant_name,
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        headlines=_headlines(run),
        charts=_charts(run),
        rl_variants=rl_variants,
        removals=_removals(run),
        hacking_views=hacking_views(run.stage3),
        key=legend_key,
    )


def template_environment(**filters: Callable[..., str]) -> jinja2.Environment:
    """Return a Jinja environment for this package's templates with additional filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spark_nemo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment


class Headline(NamedTuple):
    """A large figure at the top of the page, with smaller ones for comparison below it."""

    stage: str
    title: str
    figure: Figure
    unit: str
    comparisons: list[tuple[str, str]]
    note: str


def _headlines(run: Summary) -> list[Headline]:
    """Return at most three headlines, one per stage of the run."""
    headlines = []
    if run.stage1 and run.stage1.label_quality:
        headlines.append(_label_headline(run.stage1))
    if run.stage2 and run.stage2.f1:
        headlines.append(_f1_headline(run.stage2))
    if run.stage3:
        headlines.append(_accuracy_headline(run.stage3))
    return [headline for headline in headlines if headline is not None]


def _label_headline(stage: Stage1Summary) -> Headline | None:
    name = _main_method(stage.label_quality)
    scores = stage.label_quality[name]
    if scores.step_accuracy is None:
        return None
    comparisons = []
    single = stage.label_quality.get("single")
    if name != "single" and single and single.step_accuracy:
        comparisons.append((METHOD_NAMES["single"], f"{percent(single.step_accuracy.value)}%"))
    return Headline(
        stage="Stage I",
        title="Correct step labels",
        figure=scores.step_accuracy,
        unit="%",
        comparisons=comparisons,
        note=f"{method_name(name)}; {percent(scores.share_kept)}% of solutions kept",
    )


def _f1_headline(stage: Stage2Summary) -> Headline:
    name = _main_method(stage.f1)
    comparisons = []
    if "single" in stage.f1 and "step_consistency" in stage.f1:
        gain = _signed(stage.f1["step_consistency"] - stage.f1["single"])
        if stage.f1_gain_interval is not None:
            low, high = stage.f1_gain_interval
            gain += f" [{_signed(low)}, {_signed(high)}]"
        comparisons.append((METHOD_NAMES["single"], percent(stage.f1["single"])))
        comparisons.append(("Gain", gain))
    return Headline(
        stage="Stage II",
        title="First wrong step found, F1",
        figure=stage.methods[name].f1,
        unit="",
        comparisons=comparisons,
        note=f"{method_name(name)}; {_count(stage.cases)} ProcessBench-format cases",
    )


def _accuracy_headline(stage: Stage3Summary) -> Headline:
    candidates = [name for name in ("spark", "rlvr", "base") if name in stage.accuracy]
    main = candidates[0] if candidates else next(iter(stage.accuracy))
    comparisons = []
    for name, value in stage.accuracy.items():
        if name != main:
            comparisons.append((rl_variant_name(name), f"{percent(value)}%"))
    return Headline(
        stage="Stage III",
        title="Problems solved",
        figure=_accuracy(stage, main),
        unit="%",
        comparisons=comparisons,
        note=f"{rl_variant_name(main)}; mean of {stage.samples_per_problem} samples on "
        f"{_count(stage.problems)} held-out problems",
    )


def _main_method(by_method: Mapping[str, Any]) -> str:
    """Return the label method that the headline is about."""
    # A fixed order: choosing the highest number would be choosing after the fact.
    for name in ("step_consistency", "outcome_consistency", "single"):
        if name in by_method:
            return name
    return next(iter(by_method))


def _charts(run: Summary) -> dict[str, Markup]:
    charts: dict[str, Markup] = {}
    if run.stage1:
        bars = [
            _bar(method_name(name), _style(name), scores.step_accuracy)
            for name, scores in run.stage1.label_quality.items()
            if scores.step_accuracy is not None
        ]
        if bars:
            charts["labels"] = interval_chart(
                bars,
                "correct step labels, out of 100",
                "Step label accuracy by label method",
                bounds=(None, 1.0),
            )
    if run.stage2 and run.stage2.methods:
        bars = [
            _bar(method_name(name), _style(name), scores.f1)
            for name, scores in run.stage2.methods.items()
        ]
        charts["f1"] = interval_chart(bars, "F1 (times 100)", "ProcessBench F1 by label method")
    if run.stage3:
        rl_variants = _rl_variants(run)
        bars = [
            _bar(rl_variant_name(name), _style(name, rl_variants), _accuracy(run.stage3, name))
            for name in rl_variants
            if name in run.stage3.accuracy
        ]
        charts["accuracy"] = interval_chart(
            bars,
            "problems solved, out of 100",
            "Held-out accuracy before RL and after each RL variant",
        )
        charts |= _curves(run.stage3, rl_variants)
    return charts


class Quantity(NamedTuple):
    """A quantity that is drawn over the steps of RL."""

    value: Callable[[CurvePoint], float | None]
    label: str
    show: Callable[[float], str]
    width: int


def _curves(stage: Stage3Summary, rl_variants: Sequence[str]) -> dict[str, Markup]:
    """Draw every quantity that at least one RL variant recorded."""
    quantities = {
        "reward": Quantity(
            lambda point: point.reward, "mean reward, times 100", percent_tick, WIDTH
        ),
        "true_accuracy": Quantity(
            lambda point: point.true_accuracy, "problems solved, out of 100", percent_tick, WIDTH
        ),
        "failures": Quantity(
            _total_failures, "failed verifications, out of 100", percent_tick, SMALL_WIDTH
        ),
        "entropy": Quantity(
            lambda point: point.entropy, "entropy, nats per token", _short, SMALL_WIDTH
        ),
        "mismatch": Quantity(
            lambda point: point.mismatch, "difference, nats per token", _short, SMALL_WIDTH
        ),
    }
    charts = {}
    for name, quantity in quantities.items():
        series = []
        for rl_variant, points in stage.curves.items():
            line = [(point.step, quantity.value(point)) for point in points]
            if any(y is not None for _, y in line):
                style = _style(rl_variant, rl_variants)
                series.append(Series(rl_variant_name(rl_variant), style, line))
        if series:
            charts[name] = line_chart(
                series,
                "RL step",
                quantity.label,
                f"{quantity.label} by RL step",
                show=quantity.show,
                bounds=(0.0, None),
                width=quantity.width,
            )
    return charts


def _total_failures(point: CurvePoint) -> float | None:
    return sum(point.failure_rates.values()) if point.failure_rates else None


def _bar(name: str, style: Style, figure: Figure) -> Bar:
    return Bar(name, style, figure.value, figure.low, figure.high)


def _style(key: str, others: Sequence[str] = ()) -> Style:
    """Return a name's own style, or a distinct one by the name's place among ``others``."""
    if key in STYLES:
        return STYLES[key]
    unstyled = [name for name in others if name not in STYLES]
    place = unstyled.index(key) if key in unstyled else 0
    return _OTHER_STYLES[place % len(_OTHER_STYLES)]


def _accuracy(stage: Stage3Summary, rl_variant: str) -> Figure:
    low, high = stage.accuracy_intervals.get(rl_variant, (None, None))
    return Figure(stage.accuracy[rl_variant], low, high)


def _rl_variants(run: Summary) -> list[str]:
    if run.stage3 is None:
        return []
    solved = [solution.rl_variant for solution in run.stage3.solutions]
    return ordered_rl_variants([*run.stage3.accuracy, *run.stage3.curves, *solved])


class Removals(NamedTuple):
    """Labels that stage II's filters removed: one count per method for each rule."""

    methods: list[str]
    rows: list[tuple[str, list[int]]]


def _removals(run: Summary) -> Removals | None:
    """Return the removed labels, or None if the filters removed nothing."""
    scores = run.stage1.label_quality if run.stage1 else {}
    rows = []
    for rule, reason in REASONS.items():
        counts = [each.removed.get(rule, 0) for each in scores.values()]
        if any(rule in each.removed for each in scores.values()):
            rows.append((reason, counts))
    return Removals(list(scores), rows) if rows else None


def _stage_name(name: str) -> str:
    return STAGE_NAMES.get(name, words(name))


def _failure_name(kind: str) -> str:
    return FAILURE_NAMES.get(kind, words(kind))


def _interval(figure: Figure) -> str:
    return "" if figure.low is None else f"{percent(figure.low)} to {percent(figure.high)}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    return f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
