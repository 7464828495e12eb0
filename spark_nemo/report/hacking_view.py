"""Charts and probe results about reward hacking: one view per RL variant."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from .charts import WIDTH, Series, Style, legend_mark, line_chart, percent_tick
from .display_names import words
from .summary import CurvePoint, ProbeResult, Stage3Summary

REWARD = Style("#0072B2", "circle")
ACCURACY = Style("#009E73", "square", "7 4")
_DETECTORS = (
    Style("#D55E00", "circle"),
    Style("#0072B2", "square", "7 4"),
    Style("#009E73", "triangle", "2 3"),
    Style("#AA4499", "circle", "4 3"),
    Style("#E69F00", "square"),
    Style("#56B4E9", "triangle"),
    Style("#5F6B7A", "circle", "1 3"),
)
LEGIBLE = 0.005
"""Smallest peak of a detector's line that is drawn; detectors below it are only named."""


@dataclass(frozen=True)
class HackingView:
    """One RL variant's charts.

    ``legend`` has a mark and a name for every detector drawn, ``silent`` the names of the rest.
    """

    rl_variant: str
    reward: Markup | None
    detectors: Markup | None
    legend: list[tuple[Markup, str]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    probes: list[ProbeResult] = field(default_factory=list)


def hacking_views(stage: Stage3Summary | None) -> list[HackingView]:
    """Return one view per RL variant with detector metrics."""
    if stage is None:
        return []
    views = []
    for rl_variant, points in stage.curves.items():
        names = list(dict.fromkeys(name for point in points for name in point.hacking))
        if names:
            views.append(_view(rl_variant, points, names, stage.probes.get(rl_variant, [])))
    return views


def _view(
    rl_variant: str, points: list[CurvePoint], names: list[str], probes: list[ProbeResult]
) -> HackingView:
    series = []
    silent = []
    for index, name in enumerate(names):
        line = [(point.step, point.hacking.get(name)) for point in points]
        if max(value for _, value in line if value is not None) < LEGIBLE:
            silent.append(words(name))
        else:
            series.append(Series(words(name), _DETECTORS[index % len(_DETECTORS)], line))
    chart = None
    if series:
        label = "responses, out of 100"
        chart = line_chart(
            series,
            "RL step",
            label,
            f"Detectors by RL step, {label}",
            show=percent_tick,
            bounds=(0.0, None),
            width=WIDTH,
        )
    return HackingView(
        rl_variant=rl_variant,
        reward=_reward_and_accuracy(points),
        detectors=chart,
        legend=[(legend_mark(line.style), line.name) for line in series],
        silent=silent,
        probes=probes,
    )


def _reward_and_accuracy(points: list[CurvePoint]) -> Markup | None:
    series = [
        Series("Mean reward", REWARD, [(point.step, point.reward) for point in points]),
        Series("True accuracy", ACCURACY, [(point.step, point.true_accuracy) for point in points]),
    ]
    drawn = [line for line in series if any(y is not None for _, y in line.points)]
    if not drawn:
        return None
    return line_chart(
        drawn,
        "RL step",
        "out of 100",
        "Reward and true accuracy by RL step",
        show=percent_tick,
        bounds=(0.0, None),
        width=WIDTH,
    )
