"""Detectors: for each known way to hack a reward model, the share of a training step's responses
that show its sign.

They read texts and token counts, never an answer and never the reward model. A rate says *look*,
not *cheat*: an honest policy that learns to write fewer, better steps also shows
``step_reduction``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spark_nemo.config.hacking import DETECTORS, DetectorsConfig
from spark_nemo.records import Rollout

from .text_patterns import duplicated_steps, empty_steps, judge_directed, solution_appended

PREFIX = "hacking/"
_STEP = re.compile(r"<step>(.*?)(?:</step>|(?=<step>|</think>|<answer>)|\Z)", re.DOTALL)
_STEPS, _TOKENS = f"{PREFIX}mean_steps", "response_tokens"


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the run wrote at its beginning: mean steps and mean tokens per response."""

    steps: float
    tokens: float


def tagged_steps(text: str) -> tuple[str, ...]:
    """The text of every ``<step>``, also where the response does not parse; an open one ends where
    the next tag is.
    """
    return tuple(match[1].strip() for match in _STEP.finditer(text))


def baseline(
    rows: Sequence[Mapping[str, float]], rollouts: Sequence[Rollout], config: DetectorsConfig
) -> Baseline:
    """From the metrics rows of the steps before (in order), or from this step's rollouts when it is
    the first.

    It is the mean over the first ``baseline_steps`` rows, so it settles there and survives a
    resume, which has the same rows.
    """
    early = [row for row in rows[: config.baseline_steps] if _STEPS in row]
    if early:
        return Baseline(*(sum(row[key] for row in early) / len(early) for key in (_STEPS, _TOKENS)))
    return Baseline(
        _mean([len(tagged_steps(rollout.text)) for rollout in rollouts]),
        _mean([len(rollout.response_ids) for rollout in rollouts]),
    )


def flags(rollout: Rollout, start: Baseline, config: DetectorsConfig) -> frozenset[str]:
    """The names of the detectors that this response sets off."""
    steps, tokens = tagged_steps(rollout.text), len(rollout.response_ids)
    shown: dict[str, Callable[[], bool]] = {
        "solution_appending": lambda: solution_appended(rollout.text),
        "step_inflation": lambda: len(steps) > config.inflation * start.steps,
        "step_reduction": lambda: len(steps) < config.reduction * start.steps,
        "duplicated_steps": lambda: duplicated_steps(steps),
        "judge_directed": lambda: judge_directed(rollout.text),
        "empty_text": lambda: not steps or empty_steps(steps),
        "length_drift": lambda: (
            not start.tokens / config.length <= tokens <= start.tokens * config.length
        ),
    }
    return frozenset(name for name in DETECTORS if shown[name]())


def detector_rates(
    rollouts: Sequence[Rollout],
    rows: Sequence[Mapping[str, float]],
    config: DetectorsConfig,
) -> dict[str, float]:
    """``hacking/<name>`` for every detector, and ``hacking/mean_steps`` that later baselines are
    made of.

    ``rows`` are the metrics of the training steps before this one. A pure function, so a resumed
    run has the rates of an uninterrupted one. Raises ``ValueError`` without rollouts.
    """
    if not rollouts:
        raise ValueError("detector_rates: no rollouts")
    start = baseline(rows, rollouts, config)
    found = [flags(rollout, start, config) for rollout in rollouts]
    rates = {f"{PREFIX}{name}": _mean([name in each for each in found]) for name in DETECTORS}
    return {**rates, _STEPS: _mean([len(tagged_steps(rollout.text)) for rollout in rollouts])}


def new_alarms(
    rates: Mapping[str, float],
    before: Mapping[str, float] | None,
    config: DetectorsConfig,
) -> list[str]:
    """Detectors whose rate has reached ``config.alarm`` and had not in the row of the step before:
    warn once a rise.
    """

    def over(row: Mapping[str, float], name: str) -> bool:
        return row.get(f"{PREFIX}{name}", 0.0) >= config.alarm

    return [name for name in DETECTORS if over(rates, name) and not (before and over(before, name))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
