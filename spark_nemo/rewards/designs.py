"""Reward designs: functions from a batch of judged rollouts to one reward each.

To add a design, write a function like those at the end of this file and register it; a module of
your own is loaded with ``plugins=[my_rewards]`` (``docs/how_to_add_a_reward.md``).

In the formulas k of the n steps were judged correct, y is the final verdict and f the format gate.
A reward that counts steps does not resist step inflation: splitting a correct step in two gives
(k + 1) / (n + 1), which is more than k / n while any step is wrong. Process-aware ``f * y`` does
not read steps and resists. Source: arXiv 2512.03244.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spark_nemo.config.designs import register_reward
from spark_nemo.config.registry import option
from spark_nemo.config.reward import GatedReward, RewardConfig
from spark_nemo.grammar import extract_boxed, normalize_answer
from spark_nemo.records import (
    AnswerVerdict,
    Failure,
    FormatViolation,
    ParsedResponse,
    Rollout,
    VariantOutcome,
    Verdict,
    derive_seed,
)

from .hacking.constraints import read_response

Checker = Callable[[Sequence[tuple[str, str]]], Sequence[bool | Failure]]
"""``checker([(problem_id, response_text), ...])`` returns True for each response that reaches its
problem's answer, or the ``Failure`` of the comparison. It raises on an unknown id.
"""
STEP_WEIGHT, VERDICT_WEIGHT = 0.4, 0.6
"""Weights of the step-augmented reward."""


def process_aware_reward(
    format_violation: FormatViolation | None, outcome: VariantOutcome | None
) -> float | Failure:
    """Return ``r = f * y``: f is 0 for a format violation, else 1; y is 1 for a final Yes, else 0.

    No step is read, so every kind of reward model is supported.

    Resists inflation: splitting a correct step in two changes nothing.

    A format violation has reward 0 by the method's definition (arXiv 2512.03244, the f(s) gate).
    Pass ``outcome=None`` with it if the response was not verified. Any other missing verdict is
    returned as its ``Failure``, never as a score; ``failure_policy`` decides its cost.

    Raises ``ValueError`` for a well-formed response without an outcome.
    """
    if format_violation is not None:
        return 0.0
    match outcome:
        case Verdict() | AnswerVerdict():
            return float(outcome.answer_correct)
        case FormatViolation():
            return 0.0
        case None:
            raise ValueError(
                "process_aware_reward: a response in the format needs an outcome; "
                "it was not verified"
            )
    return outcome


def step_average_reward(
    format_violation: FormatViolation | None, outcome: VariantOutcome | None
) -> float | Failure:
    """Return ``r = k / n``, the share of correct steps.

    The paper does not gate the format here; in this package a format violation has reward 0, since
    it has no steps to judge. A final verdict never replaces missing labels: an ORM's verdict raises
    ``ValueError``.

    Does *not* resist inflation: splitting a correct step in two raises the reward (and so the total
    advantage) whenever a step is wrong. Failures and errors are those of ``process_aware_reward``.
    """
    return _gated(format_violation, outcome, correct_share)


def step_augmented_reward(
    format_violation: FormatViolation | None, outcome: VariantOutcome | None
) -> float | Failure:
    """Return ``r = f * (0.4 * k / n + 0.6 * y)``; labels C, I, C, C and verdict Yes give 0.9.

    Does *not* resist inflation: splitting a correct step in two raises the reward (and so the total
    advantage) whenever a step is wrong, by 0.4 times what it does to the step average. Failures and
    errors are those of ``process_aware_reward``.
    """
    return _gated(
        format_violation,
        outcome,
        lambda verdict: (
            STEP_WEIGHT * correct_share(verdict) + VERDICT_WEIGHT * verdict.answer_correct
        ),
    )


def correct_share(verdict: Verdict) -> float:
    """Return ``k / n``; a verdict has at least one step."""
    return sum(verdict.step_labels) / len(verdict.step_labels)


def _gated(
    format_violation: FormatViolation | None,
    outcome: VariantOutcome | None,
    score: Callable[[Verdict], float],
) -> float | Failure:
    if isinstance(outcome, AnswerVerdict):
        raise ValueError(
            "an ORM's verdict has no step labels: a reward that counts steps cannot be made of it"
        )
    if format_violation is not None or isinstance(outcome, FormatViolation):
        return 0.0
    if outcome is None:
        raise ValueError("a response in the format needs an outcome; it was not verified")
    return score(outcome) if isinstance(outcome, Verdict) else outcome


def rlvr_rewards(rollouts: Sequence[Rollout], checker: Checker) -> list[float | Failure]:
    """Return 1.0 for each rollout whose text the checker accepts, else 0.0.

    A failed comparison is returned as its ``Failure``. The paper's RLVR baseline does not gate the
    format.

    Resists inflation: no step is read.
    """
    said = checker([(rollout.problem.problem_id, rollout.text) for rollout in rollouts])
    return [float(one) if isinstance(one, bool) else one for one in said]


def random_reward(gated: ParsedResponse | FormatViolation, seed: int) -> float:
    """Return ``r = f * Bernoulli(0.5)``, drawn from ``seed`` alone.

    Source: arXiv 2512.03244, figure 4.

    Resists inflation: no step is read.
    """
    return 0.0 if isinstance(gated, FormatViolation) else float(random.Random(seed).random() < 0.5)


def majority_rewards(rollouts: Sequence[Rollout], key: Callable[[str], str]) -> list[float]:
    """Return ``r = 1`` for responses with the most frequent boxed answer of their group, else 0.

    Source: TTRL, arXiv 2504.16084. Like RLVR, it does not gate the format.

    ``key`` maps answers of equal meaning to one string. A response without an answer does not vote
    and has reward 0 by definition. Among equally frequent answers the first one wins. Groups go by
    id and may differ in size.

    Resists inflation: no step is read.
    """
    answers = [extract_boxed(rollout.text) for rollout in rollouts]
    keys = [key(answer) if answer else "" for answer in answers]
    votes: dict[int, Counter[str]] = {}
    for rollout, answer in zip(rollouts, keys):
        if answer:
            votes.setdefault(rollout.group, Counter())[answer] += 1
    labels = {group: counted.most_common(1)[0][0] for group, counted in votes.items()}
    return [
        float(bool(answer) and answer == labels[rollout.group])
        for rollout, answer in zip(rollouts, keys)
    ]


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """Return DAPO's soft over-long penalty, a term to add to the reward.

    It is 0 up to ``max_tokens - buffer`` tokens, falls linearly to -1 at ``max_tokens``, and is -1
    beyond. Source: arXiv 2503.14476, equation 13.

    It does not read steps: splitting one without adding tokens changes nothing.
    Raises ``ValueError`` unless 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(
            f"overlong_penalty: buffer={buffer} must lie in 1..max_tokens={max_tokens}"
        )
    return -min(1.0, max(0.0, (num_tokens - (max_tokens - buffer)) / buffer))


@dataclass(frozen=True, slots=True)
class RewardContext:
    """Inputs of a reward besides the rollouts and its own settings."""

    seed: int
    """``run.seed``."""
    step: int
    """Training step of the batch."""
    group_size: int
    checker: Checker | None = None
    """Compares responses with answer keys; only for a reward that declares to read them."""


def compute_scores(
    rollouts: Sequence[Rollout], config: RewardConfig, context: RewardContext
) -> list[float | Failure]:
    """Return the chosen reward of every rollout, or the ``Failure`` that left it without one."""
    design = option("rl/reward", config.name)
    assert design.function is not None, f"rl/reward={config.name} has no registered function"
    scores = design.function(rollouts, config, context)
    if len(scores) != len(rollouts):
        raise ValueError(
            f"rl/reward={config.name}: {len(scores)} rewards for {len(rollouts)} rollouts"
        )
    return scores


@register_reward("process_aware")
def _process_aware(
    rollouts: Sequence[Rollout], config: RewardConfig, context: RewardContext
) -> list[float | Failure]:
    return [process_aware_reward(*_judged(rollout)) for rollout in rollouts]


@register_reward("step_average")
def _step_average(
    rollouts: Sequence[Rollout], config: RewardConfig, context: RewardContext
) -> list[float | Failure]:
    return [step_average_reward(*_judged(rollout)) for rollout in rollouts]


@register_reward("step_augmented")
def _step_augmented(
    rollouts: Sequence[Rollout], config: RewardConfig, context: RewardContext
) -> list[float | Failure]:
    return [step_augmented_reward(*_judged(rollout)) for rollout in rollouts]


@register_reward("majority")
def _majority(
    rollouts: Sequence[Rollout], config: RewardConfig, context: RewardContext
) -> list[float | Failure]:
    return list(majority_rewards(rollouts, normalize_answer))


@register_reward("random")
def _random(
    rollouts: Sequence[Rollout], config: GatedReward, context: RewardContext
) -> list[float | Failure]:
    # The place in the step's batch, also for a group that is scored alone.
    first = rollouts[0].group * context.group_size
    return [
        random_reward(
            read_response(rollout, config.constraints),
            derive_seed("random-reward", context.seed, context.step, position),
        )
        for position, rollout in enumerate(rollouts, start=first)
    ]


@register_reward("rlvr")
def _rlvr(
    rollouts: Sequence[Rollout], config: RewardConfig, context: RewardContext
) -> list[float | Failure]:
    assert context.checker is not None, "check_stage3 asks for the answer keys"
    return rlvr_rewards(rollouts, context.checker)


def _judged(rollout: Rollout) -> tuple[FormatViolation | None, VariantOutcome | None]:
    assert rollout.verdict is not None, "the judge sets it"
    return rollout.verdict.violation, rollout.verdict.outcome
