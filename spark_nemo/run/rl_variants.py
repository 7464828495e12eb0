"""RL variants of the pipeline: a reward design with a kind of reward model, or a baseline alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.designs import (
    asks_reward_model,
    design_choices,
    needs_step_labels,
    reads_answer_keys,
    variant_suffix,
)
from spark_nemo.config.registry import carried_over, option
from spark_nemo.config.reward import ModelReward

_GROUPS = ("rl/reward", "rl/advantage", "rl/estimator", "rl/shaping")
"""Config groups that a reward design decides on."""


@dataclass(frozen=True, slots=True)
class RLVariant:
    """One RL run of the pipeline. ``variant`` is the kind of reward model that it queries, None for
    a baseline.
    """

    design: str
    variant: str | None

    @property
    def name(self) -> str:
        """Name of its folder, job and row in the report; equal to ``SparkConfig.rl_variant`` of its
        configuration.
        """
        return f"{self.design}{variant_suffix(self.variant)}"

    @property
    def reads_answer_keys(self) -> bool:
        """True for a baseline that trains on answers."""
        return reads_answer_keys(self.design)

    def comes_from_stage2(self, config: SparkConfig) -> bool:
        """True if stage II of the same pipeline makes its reward model."""
        return self.variant is not None and config.rl.named_reward_model is None


def pipeline_rl_variants(config: SparkConfig) -> list[RLVariant]:
    """Return ``pipeline.rewards`` times the kinds of reward model, without
    ``unsupported_rl_variants``.

    Raises ``ConfigError`` for a design that no kind supports, and for settings that contradict the
    list.
    """
    pipeline = config.pipeline
    named = config.rl.named_reward_model
    if named is not None and len(pipeline.variants) > 1:
        raise ConfigError(
            f"pipeline.variants={pipeline.variants} with rl.reward.model={named}: a named model is "
            "of one kind; remove one of the two"
        )
    kinds = config.reward_models
    chosen = config.rl.reward.variant if isinstance(config.rl.reward, ModelReward) else "auto"
    if chosen != "auto":
        if named is None:
            raise ConfigError(
                f"rl.reward.variant={chosen}: the pipeline queries each of pipeline.variants; name "
                "the kinds there, or set rl.reward.model"
            )
        kinds = [chosen]
    found = []
    for design in pipeline.rewards:
        supported = [kind for kind in kinds if kind != "orm" or not needs_step_labels(design)]
        if not asks_reward_model(design):
            found.append(RLVariant(design, None))
        elif not supported:
            raise ConfigError(
                f"pipeline.rewards has {design}, which needs step labels, and an ORM produces "
                "none: add prm or prm_cot to pipeline.variants, or remove it"
            )
        else:
            found += [RLVariant(design, kind) for kind in supported]
    return found


def unsupported_rl_variants(config: SparkConfig) -> list[RLVariant]:
    """Return the RL variants that cannot exist: designs that need step labels, with an ORM."""
    if "orm" not in config.pipeline.variants:
        return []
    return [
        RLVariant(design, "orm") for design in config.pipeline.rewards if needs_step_labels(design)
    ]


def rl_variant_config(config: SparkConfig, variant: RLVariant) -> SparkConfig:
    """Return the configuration that the variant's job has.

    Settings that the variant's options share with the pipeline's stay, the others are left out.
    Raises ``ConfigError`` like the job would.
    """
    changed = {}
    for group, name in _choices(config, variant).items():
        field = group.rpartition("/")[2]
        changed[field] = carried_over(getattr(config.rl, field), option(group, name).settings)
    if isinstance(changed["reward"], ModelReward) and variant.variant != _asked_kind(config):
        changed["reward"] = replace(changed["reward"], variant=variant.variant)
    return replace(
        config,
        rl=replace(config.rl, **changed),
        data=replace(config.data, rl_answers=_answers(config, variant)),
    )


def rl_variant_overrides(config: SparkConfig, variant: RLVariant) -> list[str]:
    """Return the overrides that make the variant's configuration, after the pipeline's own."""
    own = rl_variant_config(config, variant)
    words = []
    for group, name in _choices(config, variant).items():
        field = group.rpartition("/")[2]
        if field == "reward" or name != getattr(config.rl, field).name:
            words.append(f"++{group}={name}")
    if isinstance(own.rl.reward, ModelReward) and own.rl.reward.variant != "auto":
        words.append(f"rl.reward.variant={own.rl.reward.variant}")
    if own.data.rl_answers != config.data.rl_answers:
        words.append(f"data.rl_answers={own.data.rl_answers or 'null'}")
    return words


def _choices(config: SparkConfig, variant: RLVariant) -> dict[str, str]:
    """Return the option of every group that a design decides on."""
    choices = {group: getattr(config.rl, group.rpartition("/")[2]).name for group in _GROUPS}
    if choices["rl/estimator"] == "none":
        choices["rl/estimator"] = "grpo"  # the pipeline's own advantage uses no estimator
    return choices | design_choices(variant.design)


def _asked_kind(config: SparkConfig) -> str:
    """Return the kind of reward model that the pipeline's own settings ask for."""
    return config.reward_variant or config.stage2.variant


def _answers(config: SparkConfig, variant: RLVariant) -> str | None:
    """Return the answer keys of a variant that declares to read them."""
    if not variant.reads_answer_keys:
        return None
    if config.pipeline.rl_answers is None:
        raise ConfigError(
            f"pipeline.rewards has {variant.design}, which reads answer keys: set "
            "pipeline.rl_answers (JSONL with problem_id and answer)"
        )
    return config.pipeline.rl_answers
