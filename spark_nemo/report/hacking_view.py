"""What the page shows about reward hacking: reward beside true accuracy, detectors by step, probes
by kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from .charts import WIDTH, Series, Style, legend_mark, line_chart, percent_tick
from .summary import CurvePoint, ProbeResult, Stage3Summary

REWARD, ACCURACY = Style("#0072B2", "circle"), Style("#009E73", "square", "7 4")
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
"""Detectors that never reach half a percent are named and not drawn."""


@dataclass(frozen=True)
class ArmView:
    """One arm's charts. ``legend`` has a mark and a name for every detector drawn, ``silent`` the
    names of the rest.
    """

    arm: str
    reward: Markup | None
    detectors: Markup | None
    legend: list[tuple[Markup, str]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    probes: list[ProbeResult] = field(default_factory=list)


def hacking_views(stage: Stage3Summary | None) -> list[ArmView]:
    """One view per arm whose steps were watched; none when nothing was recorded."""
    views = []
    for arm, points in stage.curves.items() if stage else ():
        names = list(dict.fromkeys(name for point in points for name in point.hacking))
        if not names:
            continue
        shown = [
            name
            for name in names
            if max(point.hacking.get(name, 0.0) for point in points) >= LEGIBLE
        ]
        styles = {name: _DETECTORS[names.index(name) % len(_DETECTORS)] for name in shown}
        series = [
            Series(
                name.replace("_", " "),
                styles[name],
                [(p.step, p.hacking.get(name)) for p in points],
            )
            for name in shown
        ]
        label = "responses, out of 100"
        views.append(
            ArmView(
                arm,
                _reward_and_accuracy(points),
                line_chart(
                    series,
                    "RL step",
                    label,
                    f"Detectors by RL step, {label}",
                    percent_tick,
                    (0.0, None),
                    WIDTH,
                )
                if series
                else None,
                [(legend_mark(styles[name]), name.replace("_", " ")) for name in shown],
                [name.replace("_", " ") for name in names if name not in shown],
                stage.probes.get(arm, []),
            )
        )
    return views


def _reward_and_accuracy(points: list[CurvePoint]) -> Markup | None:
    series = [
        Series("Mean reward", REWARD, [(point.step, point.reward) for point in points]),
        Series("True accuracy", ACCURACY, [(point.step, point.true_accuracy) for point in points]),
    ]
    drawn = [line for line in series if any(y is not None for _, y in line.points)]
    return (
        line_chart(
            drawn,
            "RL step",
            "out of 100",
            "Reward and true accuracy by RL step",
            percent_tick,
            (0.0, None),
            WIDTH,
        )
        if drawn
        else None
    )
