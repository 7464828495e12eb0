"""Reward designs of stage III by name, and what each needs.

A *design* is the option of ``rl/reward``, or that of ``rl/advantage`` where it is not ``outcome``:
the two never vary together, because every other advantage is defined on the process-aware reward.
An RL variant is a design with the kind of reward model that it queries; a baseline queries none.
"""

from __future__ import annotations

from .errors import ConfigError
from .registry import GROUPS, Choice, choose, option
from .reward import VARIANTS, ModelReward

REWARD, ADVANTAGE = "rl/reward", "rl/advantage"


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
    """Return what a reward model's kind adds to a folder's name; nothing for a PRM-CoT or a
    baseline.
    """
    return "" if variant in (None, VARIANTS[0]) else f"-{variant}"


def check_design(reward: str, advantage: str, estimator: str, shaping: str) -> None:
    """Raise ``ConfigError`` for options of these groups that contradict each other."""
    if advantage == "outcome":
        return
    if reward != "process_aware":
        raise ConfigError(
            f"rl/advantage={advantage} reads step labels and the verdict as its reward: choose "
            f"rl/reward=process_aware instead of {reward}, or rl/advantage=outcome"
        )
    if not has_own_baseline(advantage):
        if estimator == "none":
            raise ConfigError(
                f"rl/estimator=none: rl/advantage={advantage} starts from an estimator's advantages; "
                "choose rl/estimator=grpo"
            )
        return
    if estimator != "none":
        raise ConfigError(
            f"rl/estimator={estimator}: rl/advantage={advantage} has a baseline of its own; choose "
            "rl/estimator=none"
        )
    if shaping != "none":
        raise ConfigError(
            f"rl/shaping={shaping}: rl/advantage={advantage} takes the reward for the verdict, which "
            "a punishment of length would falsify; choose rl/shaping=none"
        )


def check_variant(design: str, variant: str, setting: str) -> None:
    """Raise ``ConfigError`` that names ``setting`` if the reward model cannot serve the design."""
    if variant == "orm" and needs_step_labels(design):
        raise ConfigError(
            f"{setting}=orm: the reward design {design} needs step labels, which an ORM does not "
            "produce; choose prm or prm_cot, or the design process_aware"
        )
