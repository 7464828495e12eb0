"""The report page: one HTML file without script, fonts or images from elsewhere. The text is in the
template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from spark_nemo.utils.files import write_json_atomic, write_text_atomic
from spark_nemo.verification import REASONS

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
from .display_names import METHOD_NAMES, arm_name, arm_order, difference_name, method_name
from .hacking_view import hacking_views
from .summary import (
    CurvePoint,
    Figure,
    Stage2Summary,
    Stage3Summary,
    Summary,
    read_summary,
    to_plain,
)

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
BLUE, VERMILION, GREY, PURPLE = "#0072B2", "#D55E00", "#5F6B7A", "#AA4499"

FAILURE_NAMES = {
    "parse_failure": "Unreadable verifications",
    "truncated": "Cut off at the token limit",
    "engine_error": "Engine errors",
    "format_violation": "Solutions out of format",
}
PART_NAMES = {"stage1": "Stage I", "stage2": "Stage II", "stage3": "Stage III"}
STYLES = {
    "single": Style(GREY, "triangle", "2 3"),
    "outcome_consistency": Style(PURPLE, "square", "7 4"),
    "step_consistency": Style(BLUE, "circle"),
    "base": Style(GREY, "triangle", "2 3"),
    "spark": Style(BLUE, "circle"),
    "rlvr": Style(VERMILION, "square", "7 4"),
}
SMALL_WIDTH = 330
_OTHERS = [
    Style(colour, shape, dash)
    for shape, dash in (("square", "4 3"), ("triangle", "8 3 2 3"), ("circle", "1 3"))
    for colour in ("#332288", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
]


def report_page(summary: Mapping[str, Any]) -> str:
    """The page of a summary (a plain dict). Raises ``SummaryError`` when it does not fit
    ``report.model``.
    """
    run = read_summary(summary)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spark_nemo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        pct=percent,
        interval=_interval,
        signed=_signed,
        duration=_duration,
        count=_count,
        words=_words,
        difference=difference_name,
        part=lambda name: PART_NAMES.get(name, _words(name)),
        failure=lambda kind: FAILURE_NAMES.get(kind, _words(kind)),
        method=method_name,
        arm=arm_name,
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        headlines=_headlines(run),
        charts=_charts(run),
        arms=_arms(run),
        methods=_ordered(run),
        removals=_removals(run),
        watched=hacking_views(run.stage3),
        key=lambda name: legend_mark(_style(name, _arms(run))),
    )


def write_report(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json`` and ``report.html`` into ``folder`` (made if absent) and return the
    page's path.

    Raises ``SummaryError`` before anything is written when the summary does not fit
    ``report.model``.
    """
    plain = to_plain(read_summary(summary))
    page = report_page(plain)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / SUMMARY_FILE, plain)
    write_text_atomic(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def _headlines(run: Summary) -> list[dict[str, Any]]:
    """Up to three large figures, one per stage that the run has."""
    cards = []
    if run.stage1 and (labels := run.stage1.label_quality):
        name = _best(labels)
        if (step := labels[name].step_accuracy) is not None:
            single = labels.get("single")
            cards.append(
                {
                    "stage": "Stage I",
                    "what": "Step labels that are right",
                    "figure": step,
                    "unit": "%",
                    "beside": [(METHOD_NAMES["single"], f"{percent(single.step_accuracy.value)}%")]
                    if name != "single" and single and single.step_accuracy
                    else [],
                    "note": f"{method_name(name)}; {percent(labels[name].share_kept)}% of solutions kept",
                }
            )
    if run.stage2 and run.stage2.f1:
        name = _best(run.stage2.f1)
        cards.append(
            {
                "stage": "Stage II",
                "what": "First wrong step found, F1",
                "figure": run.stage2.methods[name].f1,
                "unit": "",
                "beside": _gain(run.stage2),
                "note": f"{method_name(name)}; {_count(run.stage2.cases)} ProcessBench-format cases",
            }
        )
    if run.stage3:
        arm = next(
            name
            for name in ("spark", "rlvr", "base", *run.stage3.accuracy)
            if name in run.stage3.accuracy
        )
        cards.append(
            {
                "stage": "Stage III",
                "what": "Problems solved",
                "figure": _accuracy(run.stage3, arm),
                "unit": "%",
                "beside": [
                    (arm_name(other), f"{percent(value)}%")
                    for other, value in run.stage3.accuracy.items()
                    if other != arm
                ],
                "note": f"{arm_name(arm)}; mean of {run.stage3.samples_per_problem} samples on "
                f"{_count(run.stage3.problems)} held-out problems",
            }
        )
    return cards


def _gain(stage: Stage2Summary) -> list[tuple[str, str]]:
    rows = []
    if "single" in stage.f1 and "step_consistency" in stage.f1:
        gain = stage.f1["step_consistency"] - stage.f1["single"]
        interval = (
            ""
            if stage.f1_gain_interval is None
            else " [{}, {}]".format(*map(_signed, stage.f1_gain_interval))
        )
        rows = [
            (METHOD_NAMES["single"], percent(stage.f1["single"])),
            ("Gain", _signed(gain) + interval),
        ]
    return rows


def _charts(run: Summary) -> dict[str, Markup]:
    charts: dict[str, Markup] = {}
    if run.stage1:
        bars = [
            _bar(method_name(name), name, scores.step_accuracy)
            for name, scores in run.stage1.label_quality.items()
            if scores.step_accuracy is not None
        ]
        if bars:
            charts["labels"] = interval_chart(
                bars,
                "step labels that are right, out of 100",
                "Step label accuracy by labelling method",
                (None, 1.0),
            )
    if run.stage2 and run.stage2.methods:
        charts["f1"] = interval_chart(
            [
                _bar(method_name(name), name, run.stage2.methods[name].f1)
                for name in run.stage2.methods
            ],
            "F1 (times 100)",
            "ProcessBench F1 by labelling method",
        )
    if run.stage3:
        charts["accuracy"] = interval_chart(
            [
                _bar(arm_name(arm), arm, _accuracy(run.stage3, arm), _arms(run))
                for arm in _arms(run)
                if arm in run.stage3.accuracy
            ],
            "problems solved, out of 100",
            "Held-out accuracy before RL and after each kind of RL",
        )
        charts.update(_curves(run.stage3, _arms(run)))
    return charts


def _curves(stage: Stage3Summary, arms: Sequence[str]) -> dict[str, Markup]:
    """A chart per quantity that any arm recorded; an arm without it has no line."""
    quantities = {
        "reward": (lambda p: p.reward, "mean reward, times 100", percent_tick, (0.0, None)),
        "true_accuracy": (
            lambda p: p.true_accuracy,
            "problems solved, out of 100",
            percent_tick,
            (0.0, None),
        ),
        "failures": (
            _total_failures,
            "failed verifications, out of 100",
            percent_tick,
            (0.0, None),
        ),
        "entropy": (lambda p: p.entropy, "entropy, nats per token", _short, (0.0, None)),
        "mismatch": (lambda p: p.mismatch, "difference, nats per token", _short, (0.0, None)),
    }
    charts = {}
    for name, (value, label, show, bounds) in quantities.items():
        series = [
            Series(arm_name(arm), _style(arm, arms), [(p.step, value(p)) for p in points])
            for arm, points in stage.curves.items()
        ]
        series = [line for line in series if any(y is not None for _, y in line.points)]
        if series:
            charts[name] = line_chart(
                series,
                "RL step",
                label,
                f"{label} by RL step",
                show,
                bounds,
                WIDTH if name in ("reward", "true_accuracy") else SMALL_WIDTH,
            )
    return charts


def _total_failures(point: CurvePoint) -> float | None:
    return sum(point.failure_rates.values()) if point.failure_rates else None


def _bar(name: str, key: str, figure: Figure, others: Sequence[str] = ()) -> Bar:
    return Bar(name, _style(key, others), figure.value, figure.low, figure.high)


def _style(key: str, others: Sequence[str]) -> Style:
    """The colour of a name; of names without one each has its own by its place among them, as long
    as there are any.
    """
    if key in STYLES:
        return STYLES[key]
    free = [name for name in others if name not in STYLES]
    return _OTHERS[free.index(key) % len(_OTHERS)] if key in free else _OTHERS[0]


def _accuracy(stage: Stage3Summary, arm: str) -> Figure:
    return Figure(stage.accuracy[arm], *stage.accuracy_intervals.get(arm, (None, None)))


def _arms(run: Summary) -> list[str]:
    if run.stage3 is None:
        return []
    names = [*run.stage3.accuracy, *run.stage3.curves, *(s.arm for s in run.stage3.solutions)]
    return arm_order(names)


def _ordered(run: Summary) -> list[str]:
    names = [
        *(run.stage1.label_quality if run.stage1 else ()),
        *(run.stage2.methods if run.stage2 else ()),
    ]
    return [n for n in dict.fromkeys([*METHOD_NAMES, *names]) if n in names]


def _removals(run: Summary) -> dict[str, Any] | None:
    """What the filters removed, by rule and method; None when they removed nothing."""
    scores = run.stage1.label_quality if run.stage1 else {}
    rules = [rule for rule in REASONS if any(rule in each.removed for each in scores.values())]
    rows = [
        {"why": REASONS[rule], "counts": [each.removed.get(rule, 0) for each in scores.values()]}
        for rule in rules
    ]
    return {"methods": list(scores), "rows": rows} if rows else None


def _best(by_method: Mapping[str, Any]) -> str:
    """The method the pipeline goes on with, not the one with the highest number: that would be
    picking afterwards.
    """
    ours = ("step_consistency", "outcome_consistency", "single")
    return next(name for name in (*ours, *by_method) if name in by_method)


def _interval(figure: Figure) -> str:
    return "" if figure.low is None else f"{percent(figure.low)} to {percent(figure.high)}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    return f"{value:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
