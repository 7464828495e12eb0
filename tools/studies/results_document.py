"""The results document: one row per seed, and the mean over seeds with an interval that covers the
seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spark_nemo.report.display_names import arm_name, arm_order
from spark_nemo.report.student_interval import mean_and_half_width
from spark_nemo.report.summary import Summary, SummaryError, read_summary

_NOT_SHOWN = """\
What this does not show:

- The intervals in the per-seed rows come from resampling the cases of that one run; only the last row covers training
  again.
- The gain in F1 is paired over the same cases of one run. With few seeds the interval over seeds is wide, and it is the
  one to quote.
- Nothing here says how the method does with other models, on other problems, or for longer training.
- A dash means that the part was not run. It does not mean zero."""


def results_markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown for docs/results.md from the summaries of runs that differ in their seed only.

    F1 and accuracy are times 100. The last row is the mean and, from two seeds on, the half-width
    of Student's 95% interval over seeds. Raises ``SummaryError`` without summaries or when two of
    them share a seed.
    """
    runs = [read_summary(summary) for summary in summaries]
    if not runs:
        raise SummaryError("results need at least one summary")
    seeds = [tuple(run.seeds) for run in runs]
    if len(set(seeds)) != len(seeds):
        raise SummaryError(f"two summaries have the same seeds {seeds}: they would count twice")
    over = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
    return (
        "\n\n".join(
            [
                f"# The small world over {over}",
                _commands(runs),
                "## Reward models: F1 by labelling method\n\n"
                + _table(
                    runs,
                    [
                        ("single", lambda r: _f1(r, "single"), _percent),
                        ("outcome consistency", lambda r: _f1(r, "outcome_consistency"), _percent),
                        ("step consistency", lambda r: _f1(r, "step_consistency"), _percent),
                        ("gain of step consistency over single", _gain, _signed),
                    ],
                    {"gain of step consistency over single": _gain_interval},
                ),
                "## Policies: held-out problems solved\n\n" + _policies(runs),
                "## Seconds of work by stage (jobs that ran side by side are added up)\n\n"
                + _table(
                    runs,
                    [
                        *(
                            (
                                part.replace("_", " "),
                                lambda r, part=part: r.seconds.get(part),
                                _seconds,
                            )
                            for part in dict.fromkeys(part for run in runs for part in run.seconds)
                        ),
                        ("all", lambda r: sum(r.seconds.values()) if r.seconds else None, _seconds),
                    ],
                    {},
                ),
                _NOT_SHOWN,
            ]
        )
        + "\n"
    )


def _policies(runs: Sequence[Summary]) -> str:
    arms = {"base": "before RL", "spark": "SPARK", "rlvr": "RLVR (reads answer keys)"}
    found = [arm for run in runs if run.stage3 for arm in run.stage3.accuracy]
    names = {arm: arms.get(arm) or arm_name(arm) for arm in arm_order([*arms, *found])}
    return _table(
        runs,
        [(name, lambda r, arm=arm: _accuracy(r, arm), _percent) for arm, name in names.items()],
        {name: _accuracy_interval(arm) for arm, name in names.items()},
    )


Column = tuple[str, Callable[[Summary], float | None], Callable[[float], str]]
Interval = Callable[[Summary], tuple[float, float] | None]


def over_seeds(values: Sequence[float | None], factor: float = 1.0) -> str:
    """``mean ± half-width`` of Student's 95% interval, times ``factor``; says so when some seeds
    have no value.
    """
    known = [factor * value for value in values if value is not None]
    if not known:
        return "–"
    mean, half = mean_and_half_width(known)
    partial = "" if len(known) == len(values) else f" ({len(known)} seeds)"
    return f"{mean:.1f}" + ("" if half is None else f" ± {half:.1f}") + partial


def _table(
    runs: Sequence[Summary], columns: Sequence[Column], intervals: Mapping[str, Interval]
) -> str:
    rows = [["seed", *(name for name, _, _ in columns)], ["---", *("---:" for _ in columns)]]
    for run in runs:
        cells = []
        for name, value, show in columns:
            number, interval = value(run), intervals[name](run) if name in intervals else None
            cells.append(
                "–"
                if number is None
                else show(number)
                + ("" if interval is None else f" [{show(interval[0])}, {show(interval[1])}]")
            )
        rows.append([", ".join(map(str, run.seeds)) or "–", *cells])
    rows.append(
        [f"**mean of {len(runs)}**", *(_mean_cell(runs, value, show) for _, value, show in columns)]
    )
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _mean_cell(
    runs: Sequence[Summary],
    value: Callable[[Summary], float | None],
    show: Callable[[float], str],
) -> str:
    numbers = [number for run in runs if (number := value(run)) is not None]
    if not numbers:
        return "–"
    mean, half = mean_and_half_width(numbers)
    partial = "" if len(numbers) == len(runs) else f" ({len(numbers)} runs)"
    return show(mean) + ("" if half is None else f" ± {show(half).lstrip('+')}") + partial


def _commands(runs: Sequence[Summary]) -> str:
    commands = list(dict.fromkeys(command for run in runs for command in run.commands))
    if not commands:
        return "The runs did not record the commands that produced them."
    return "Produced by:\n\n```\n" + "\n".join(commands).replace("```", "` ` `") + "\n```"


def _f1(run: Summary, method: str) -> float | None:
    return run.stage2.f1.get(method) if run.stage2 else None


def _gain(run: Summary) -> float | None:
    step, single = _f1(run, "step_consistency"), _f1(run, "single")
    return None if step is None or single is None else step - single


def _gain_interval(run: Summary) -> tuple[float, float] | None:
    return run.stage2.f1_gain_interval if run.stage2 else None


def _accuracy(run: Summary, arm: str) -> float | None:
    return run.stage3.accuracy.get(arm) if run.stage3 else None


def _accuracy_interval(arm: str) -> Interval:
    return lambda run: run.stage3.accuracy_intervals.get(arm) if run.stage3 else None


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _seconds(value: float) -> str:
    return f"{value:.0f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
