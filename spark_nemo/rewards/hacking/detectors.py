"""Detectors: shares of a training step's responses that show a known symptom of reward hacking.

They read texts and token counts, never an answer or the reward model. A high rate is a reason to
inspect responses, not a proof: an honest policy that learns to write fewer, better steps also shows
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
    """Mean steps and mean tokens per response at the run's beginning."""

    steps: float
    tokens: float


def tagged_steps(text: str) -> tuple[str, ...]:
    """Return the text of every ``<step>``, also in a response that does not parse.

    An open step ends at the next tag.
    """
    return tuple(match[1].strip() for match in _STEP.finditer(text))


def baseline(
    rows: Sequence[Mapping[str, float]], rollouts: Sequence[Rollout], config: DetectorsConfig
) -> Baseline:
    """Return the means of the first ``baseline_steps`` metrics rows; at the first step, its own.

    ``rows`` are the metrics of earlier training steps, in order. A resumed run has the same rows
    and so the same baseline.
    """
    early = [row for row in rows[: config.baseline_steps] if _STEPS in row]
    if early:
        return Baseline(*(sum(row[key] for row in early) / len(early) for key in (_STEPS, _TOKENS)))
    return Baseline(
        _mean([len(tagged_steps(rollout.text)) for rollout in rollouts]),
        _mean([len(rollout.response_ids) for rollout in rollouts]),
    )


def flags(rollout: Rollout, start: Baseline, config: DetectorsConfig) -> frozenset[str]:
    """Return the names of the detectors that this response triggers."""
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
    """Return ``hacking/<name>`` for every detector, and ``hacking/mean_steps`` for later baselines.

    ``rows`` are the metrics of earlier training steps. The function is pure, so a resumed run has
    the rates of an uninterrupted one. Raises ``ValueError`` without rollouts.
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
    """Return the detectors whose rate reached ``config.alarm`` at this step.

    A detector that was already above it at the step before is left out, to warn once per rise.
    """

    def over(row: Mapping[str, float], name: str) -> bool:
        return row.get(f"{PREFIX}{name}", 0.0) >= config.alarm

    return [name for name in DETECTORS if over(rates, name) and not (before and over(before, name))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
