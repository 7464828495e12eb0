"""Reward designs of stage III by name, and what each needs.

A *design* is the option of ``rl/reward``, or that of ``rl/advantage`` where it is not ``outcome``:
the two never vary together, because every other advantage is defined on the process-aware reward.
An RL variant is a design with the kind of reward model that it queries; a baseline queries none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .errors import ConfigError
from .registry import GROUPS, Choice, choose, option, register_function, register_option
from .reward import VARIANTS, ModelReward, RewardConfig

REWARD, ADVANTAGE = "rl/reward", "rl/advantage"


Design = TypeVar("Design", bound=Callable[..., Any])


def register_reward(
    name: str,
    *,
    config: type[RewardConfig] = ModelReward,
    needs_step_labels: bool = False,
    reads_answer_keys: bool = False,
) -> Callable[[Design], Design]:
    """Register the decorated function as the reward ``rl/reward=name``.

    The function gets ``(rollouts, config, context)`` and returns one reward per rollout, or the
    ``Failure`` that left the rollout without one. ``config`` is the dataclass of its settings: a
    ``ModelReward`` queries a reward model and finds its verdict in ``rollout.verdict``, a
    ``GatedReward`` has the format gate's constraints, a ``RewardConfig`` has no settings. Only a
    reward with ``reads_answer_keys`` gets the answer checker.
    """

    def register(function: Design) -> Design:
        if name not in GROUPS[REWARD]:
            register_option(
                REWARD,
                config(name=name),
                needs_step_labels=needs_step_labels,
                reads_answer_keys=reads_answer_keys,
            )
        register_function(REWARD, name, function)
        return function

    return register


def register_advantage(
    name: str,
    *,
    config: type[Choice] | None = None,
    needs_step_labels: bool = True,
    own_baseline: bool = False,
) -> Callable[[Design], Design]:
    """Register the decorated function as the advantage ``rl/advantage=name``.

    The function gets ``(responses, outcome_N, config)`` and returns one tensor of token advantages
    per response. ``outcome_N`` holds the estimator's advantages, or is None with ``own_baseline``,
    which uses no estimator. ``config`` is an ``AdvantageConfig`` with the advantage's settings.
    """

    def register(function: Design) -> Design:
        if name not in GROUPS[ADVANTAGE]:
            settings = config or type(GROUPS[ADVANTAGE]["outcome"].settings)
            register_option(
                ADVANTAGE,
                settings(name=name),
                brings={"rl/estimator": "none"} if own_baseline else None,
                needs_step_labels=needs_step_labels,
            )
        register_function(ADVANTAGE, name, function)
        return function

    return register


def designs() -> list[str]:
    """Names of all reward designs."""
    return sorted((GROUPS[REWARD].keys() | GROUPS[ADVANTAGE].keys()) - {"outcome"})


def reward_and_advantage(design: str) -> tuple[str, str]:
    """Return the options of ``rl/reward`` and ``rl/advantage`` that a design is made of."""
    if design in GROUPS[ADVANTAGE]:
        return "process_aware", design
    return design, "outcome"


def design_choices(design: str) -> dict[str, str]:
    """Return the option of every config group that a design decides on."""
    reward, advantage = reward_and_advantage(design)
    choices = {REWARD: reward, ADVANTAGE: advantage}
    if has_own_baseline(advantage):
        choices |= {**option(ADVANTAGE, advantage).brings, "rl/shaping": "none"}
    return choices


def design_settings(design: str) -> dict[str, Choice]:
    """Return the fields of an ``RLConfig`` that a design decides on, with their defaults."""
    return {
        group.rpartition("/")[2]: choose(group, name)
        for group, name in design_choices(design).items()
    }


def step_advantages() -> list[str]:
    """Names of the advantages that are computed per token, from step labels."""
    return sorted(GROUPS[ADVANTAGE].keys() - {"outcome"})


def has_own_baseline(advantage: str) -> bool:
    """True if the advantage compares responses itself, so that no estimator is used."""
    return option(ADVANTAGE, advantage).brings.get("rl/estimator") == "none"


def asks_reward_model(design: str) -> bool:
    """True if the design queries a reward model."""
    reward, _ = reward_and_advantage(design)
    found = GROUPS[REWARD].get(reward)
    return found is not None and isinstance(found.settings, ModelReward)


def needs_step_labels(design: str) -> bool:
    """True if the design is made of step labels, which an ORM does not produce."""
    reward, advantage = reward_and_advantage(design)
    return any(
        option(group, name).needs_step_labels
        for group, name in ((REWARD, reward), (ADVANTAGE, advantage))
    )


def reads_answer_keys(design: str) -> bool:
    """True if the design is a declared baseline that trains on answers."""
    reward, _ = reward_and_advantage(design)
    found = GROUPS[REWARD].get(reward)
    return found is not None and found.reads_answer_keys


def variant_suffix(variant: str | None) -> str:
    """Return the folder-name suffix of a reward model's kind; empty for a PRM-CoT or a baseline."""
    return "" if variant in (None, VARIANTS[0]) else f"-{variant}"


def check_design(reward: str, advantage: str, estimator: str, shaping: str) -> None:
    """Raise ``ConfigError`` for options of these groups that contradict each other."""
    if advantage == "outcome":
        return
    if reward != "process_aware" and option(ADVANTAGE, advantage).needs_step_labels:
        raise ConfigError(
            f"rl/advantage={advantage} reads step labels and the verdict as its reward: choose "
            f"rl/reward=process_aware instead of {reward}, or rl/advantage=outcome"
        )
    if not has_own_baseline(advantage):
        if estimator == "none":
            raise ConfigError(
                f"rl/estimator=none: rl/advantage={advantage} starts from an estimator's "
                "advantages; choose rl/estimator=grpo"
            )
        return
    if estimator != "none":
        raise ConfigError(
            f"rl/estimator={estimator}: rl/advantage={advantage} has a baseline of its own; choose "
            "rl/estimator=none"
        )
    if shaping != "none":
        raise ConfigError(
            f"rl/shaping={shaping}: rl/advantage={advantage} takes the reward for the verdict, "
            "which a punishment of length would falsify; choose rl/shaping=none"
        )


def check_variant(design: str, variant: str, setting: str) -> None:
    """Raise ``ConfigError`` that names ``setting`` if the reward model cannot serve the design."""
    if variant == "orm" and needs_step_labels(design):
        raise ConfigError(
            f"{setting}=orm: the reward design {design} needs step labels, which an ORM does not "
            "produce; choose prm or prm_cot, or the design process_aware"
        )
