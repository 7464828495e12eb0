"""The arms of the pipeline's stage III: a reward design with a kind of reward model, or a baseline
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.designs import (
    NEEDS_STEP_LABELS,
    READS_ANSWER_KEYS,
    asks_reward_model,
    reward_and_advantage,
    unread_knobs,
    variant_suffix,
)
from spark_nemo.config.errors import without_effect


@dataclass(frozen=True, slots=True)
class RLVariant:
    """One RL run of the pipeline. ``variant`` is the kind of reward model it asks, None for a
    baseline.
    """

    design: str
    variant: str | None

    @property
    def name(self) -> str:
        """Of its folder, job and row in the report: equal to ``SparkConfig.rl_variant`` of its
        configuration.
        """
        return f"{self.design}{variant_suffix(self.variant)}"

    @property
    def reads_answer_keys(self) -> bool:
        """Is it a baseline that trains on answers?"""
        return self.design in READS_ANSWER_KEYS

    def comes_from_stage2(self, config: SparkConfig) -> bool:
        """Does stage II of the same pipeline make its reward model?"""
        return self.variant is not None and config.rl.reward_model is None


def pipeline_rl_variants(config: SparkConfig) -> list[RLVariant]:
    """``pipeline.rewards`` times the kinds of reward model, without what an ORM cannot reward
    (``unsupported_rl_variants``).

    Raises ``ConfigError`` for a design that is left out with every kind, and for settings that
    would contradict the list.
    """
    rl, pipeline = config.rl, config.pipeline
    if rl.reward_model is not None and len(pipeline.variants) > 1:
        raise ConfigError(
            f"pipeline.variants={pipeline.variants} with rl.reward_model={rl.reward_model}: a named "
            "model is of one kind; remove one of the two"
        )
    if rl.reward_model is None and rl.reward_variant is not None:
        raise without_effect(
            "rl.reward_variant",
            rl.reward_variant,
            "in the pipeline, whose arms ask each of pipeline.variants",
        )
    variants = [rl.reward_variant] if rl.reward_variant is not None else config.reward_models
    arms = []
    for design in pipeline.rewards:
        asked = [
            variant for variant in variants if variant != "orm" or design not in NEEDS_STEP_LABELS
        ]
        if not asks_reward_model(design):
            arms.append(RLVariant(design, None))
        elif not asked:
            raise ConfigError(
                f"pipeline.rewards has {design}, which is made of step labels, and an ORM gives none: "
                "add prm or prm_cot to pipeline.variants, or remove it"
            )
        else:
            arms += [RLVariant(design, variant) for variant in asked]
    return arms


def unsupported_rl_variants(config: SparkConfig) -> list[RLVariant]:
    """The arms that ``pipeline_rl_variants`` has not: designs made of step labels with an ORM, which gives
    none.
    """
    return [
        RLVariant(design, "orm")
        for design in config.pipeline.rewards
        if design in NEEDS_STEP_LABELS and "orm" in config.pipeline.variants
    ]


def rl_variant_settings(config: SparkConfig, arm: RLVariant) -> dict[str, object]:
    """What makes the arm's configuration out of the pipeline's, by dotted name: its design, its
    reward model, and settings taken back that its design does not read.

    Raises ``ConfigError`` for an arm that needs answer keys where there are none.
    """
    reward, advantage = reward_and_advantage(arm.design)
    settings: dict[str, object] = {"rl.reward": reward}
    if config.rl.advantage != advantage:
        settings["rl.advantage"] = advantage
    if arm.variant is not None and arm.variant != config.reward_variant_asked:
        settings["rl.reward_variant"] = arm.variant
    if config.data.rl_answers is not None:
        settings["data.rl_answers"] = None
    if arm.reads_answer_keys:
        if config.pipeline.rl_answers is None:
            raise ConfigError(
                "pipeline.rewards has rlvr: set pipeline.rl_answers (JSONL with problem_id and answer)"
            )
        settings["data.rl_answers"] = config.pipeline.rl_answers
    for name, unset in unread_knobs(arm.design).items():
        if attrgetter(name)(config.rl) != unset:
            settings[f"rl.{name}"] = unset
    unread = config.rl.hacking.unread(reward, asks_reward_model=asks_reward_model(arm.design))
    return {**settings, **{f"rl.hacking.{name}": unset for name, unset in unread.items()}}


def rl_variant_config(config: SparkConfig, arm: RLVariant) -> SparkConfig:
    """The configuration that the arm's job will have. Raises ``ConfigError`` like the job would."""
    # All at once and inside out: a setting alone may contradict the others.
    return _with(
        config,
        {tuple(name.split(".")): value for name, value in rl_variant_settings(config, arm).items()},
    )


def _with(section: Any, values: Mapping[tuple[str, ...], object]) -> Any:
    """A copy of a configuration dataclass with ``values`` at their paths."""
    changed = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name in {path[0] for path in values if len(path) > 1}:
        inner = {path[1:]: value for path, value in values.items() if path[0] == name}
        changed[name] = _with(getattr(section, name), inner)
    return replace(section, **changed)


def as_overrides(settings: Mapping[str, object]) -> list[str]:
    """Settings as Hydra overrides."""
    return [f"{name}={_written(value)}" for name, value in settings.items()]


def _written(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
