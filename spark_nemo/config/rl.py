"""Settings of stage III: advantages, estimators, reward shaping, KL term, and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from .designs import check_design, check_variant
from .engine import SamplingConfig
from .errors import ConfigError, at_least, one_of
from .hacking import HackingConfig
from .registry import Choice, register_option
from .reward import (
    FailurePolicy,
    FallibleReward,
    GatedReward,
    MaskFailures,
    ModelReward,
    RewardConfig,
)
from .rollout import DynamicSampling, RolloutConfig
from .trainer import OptimizerConfig


@dataclass
class AdvantageConfig(Choice):
    """An advantage without settings (``rl/advantage``)."""

    name: str = "outcome"

    def outcome_reward(self, reward: float, num_steps: int) -> float:
        """Return the reward of a response with ``num_steps`` steps."""
        return reward


@dataclass
class SelectiveAdvantage(AdvantageConfig):
    """Selective advantages: a token keeps its advantage where its step's label agrees."""

    name: str = "selective"
    min_steps: int = 1
    """A response with fewer steps has outcome reward 0. The published code uses 4; the paper gives
    no bound.
    """
    max_steps: int | None = None
    """A response with more steps has outcome reward 0. The published code uses 20. None is
    unbounded. Splitting a step may cross either bound.
    """

    def __post_init__(self) -> None:
        _check_step_bounds(self.min_steps, self.max_steps)

    def outcome_reward(self, reward: float, num_steps: int) -> float:
        """Return the reward, or 0 outside the bounds."""
        inside = self.min_steps <= num_steps and (
            self.max_steps is None or num_steps <= self.max_steps
        )
        return reward if inside else 0.0


@dataclass
class StepPenaltyAdvantage(AdvantageConfig):
    """Global step rewards, without step rewards for responses of too few or too many steps."""

    name: str = "global_step_penalty"
    min_steps: int = 3
    """A response with fewer steps has no step rewards."""
    max_steps: int = 20
    """A response with more steps has no step rewards."""

    def __post_init__(self) -> None:
        _check_step_bounds(self.min_steps, self.max_steps)


def _check_step_bounds(low: int, high: int | None) -> None:
    at_least("rl.advantage.min_steps", low, 1)
    if high is None:
        return
    at_least("rl.advantage.max_steps", high, 1)
    if low > high:
        raise ConfigError(f"rl.advantage.min_steps={low}: at most rl.advantage.max_steps={high}")


@dataclass
class EstimatorConfig(Choice):
    """Estimator of one advantage per response (``rl/estimator``), without settings."""

    name: str = "none"


@dataclass
class GrpoEstimator(EstimatorConfig):
    """GRPO: rewards centred on their group's mean."""

    name: str = "grpo"
    std_normalize: bool = True
    """Divide a group's centred rewards by their standard deviation."""


@dataclass
class ShapingConfig(Choice):
    """Nothing is added to the design's reward (``rl/shaping=none``)."""

    name: str = "none"


@dataclass
class OverlongShaping(ShapingConfig):
    """DAPO's soft punishment of over-long responses, added to the reward."""

    name: str = "overlong"
    buffer: int = 512
    """Number of tokens before rl.sampling.max_new_tokens over which the term falls from 0 to -1."""

    def __post_init__(self) -> None:
        at_least("rl.shaping.buffer", self.buffer, 1)


@dataclass
class KLConfig(Choice):
    """No KL term in the loss (``rl/kl=none``)."""

    name: str = "none"


@dataclass
class KLPenalty(KLConfig):
    """Estimate of KL(policy, reference) in the loss: k1, k2 or k3."""

    name: str = "k3"
    coef: float = 1e-3
    """Weight of the KL term."""

    def __post_init__(self) -> None:
        if not 0 < self.coef < math.inf:
            raise ConfigError(f"rl.kl.coef={self.coef}: must be positive and finite")


@dataclass
class LossConfig(Choice):
    """One optimizer step per batch (``rl/loss=on_policy``): the policy ratio is 1, so nothing is
    clipped.
    """

    name: str = "on_policy"
    aggregation: str = "auto"
    """Mean over tokens (token_mean), over sequences (sequence_mean) or over a constant length
    (length_constant). auto: length_constant with rl/estimator=dr_grpo, otherwise token_mean.
    """
    tis_clip: float | None = 2.0
    """Upper bound of the truncated importance weight between engine and trainer log-probabilities.
    None disables the weight.
    """

    num_minibatches: ClassVar[int] = 1
    importance_sampling_level: ClassVar[str] = "token"
    clip_low: ClassVar[float] = 0.2
    clip_high: ClassVar[float] = 0.2

    def __post_init__(self) -> None:
        one_of(
            "rl.loss.aggregation",
            self.aggregation,
            {"auto", "token_mean", "sequence_mean", "length_constant"},
        )
        if self.tis_clip is not None:
            at_least("rl.loss.tis_clip", self.tis_clip, 1)


@dataclass
class ClippedLoss(LossConfig):
    """Several optimizer steps per batch (``rl/loss=clipped``), with PPO's clipped ratio."""

    name: str = "clipped"
    num_minibatches: int = 2
    """Optimizer steps per rollout batch; the batch is split by groups."""
    importance_sampling_level: str = "token"
    """Level of the clipped ratio: ``token``, or ``sequence`` (GSPO, whose objective has
    rl.loss.aggregation=sequence_mean).
    """
    clip_low: float = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip of the ratio: 1 + clip_high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(
            "rl.loss.importance_sampling_level",
            self.importance_sampling_level,
            {"token", "sequence"},
        )
        if self.num_minibatches < 2:
            raise ConfigError(
                f"rl.loss.num_minibatches={self.num_minibatches}: must be at least 2; one step per "
                "batch is rl/loss=on_policy"
            )
        for name in ("clip_low", "clip_high"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"rl.loss.{name}={getattr(self, name)}: must be positive")


@dataclass
class RLConfig:
    """GRPO. The names follow the field: a *group* is the rollouts of one prompt."""

    steps: int = 100
    """Training steps."""
    prompts_per_step: int = 256
    """Groups per training step."""
    group_size: int = 16
    """Rollouts of one prompt."""
    prompt_set: str = "paper"
    """Wording of the prompts: ``paper``, or ``compact`` for the toy task's models."""
    reward: RewardConfig = field(default_factory=ModelReward)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    estimator: EstimatorConfig = field(default_factory=GrpoEstimator)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the rollouts."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    eval_every: int = 10
    """Training steps between two evaluations."""
    save_every: int = 50
    """Training steps between two checkpoints."""
    hacking: HackingConfig = field(default_factory=HackingConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "eval_every", "save_every"):
            at_least(f"rl.{name}", getattr(self, name), 1)
        at_least("rl.group_size", self.group_size, 2)
        one_of("rl.prompt_set", self.prompt_set, {"paper", "compact"})
        check_design(self.reward.name, self.advantage.name, self.estimator.name, self.shaping.name)
        if isinstance(self.reward, ModelReward):
            check_variant(self.design, self.reward.variant, "rl.reward.variant")
        self._check_loss()
        self._check_rollout()
        self._check_lengths()

    @property
    def asks_reward_model(self) -> bool:
        """True if the reward is made from a reward model's verdicts."""
        return isinstance(self.reward, ModelReward)

    @property
    def named_reward_model(self) -> str | None:
        """Folder of the reward model if the configuration names one; None for stage II's own model
        or a baseline.
        """
        if isinstance(self.reward, ModelReward) and self.reward.model != "auto":
            return self.reward.model
        return None

    @property
    def design(self) -> str:
        """Name of the reward design: the reward's, unless the advantage reads step labels."""
        return self.reward.name if self.advantage.name == "outcome" else self.advantage.name

    @property
    def failures(self) -> FailurePolicy:
        """Failure policy; ``mask`` for rewards that cannot fail, which do not have the setting."""
        return self.reward.failures if isinstance(self.reward, FallibleReward) else MaskFailures()

    @property
    def aggregation(self) -> str:
        """``loss.aggregation`` with auto resolved."""
        if self.loss.aggregation != "auto":
            return self.loss.aggregation
        return "length_constant" if self.estimator.name == "dr_grpo" else "token_mean"

    def _check_loss(self) -> None:
        if self.loss.num_minibatches > self.prompts_per_step:
            raise ConfigError(
                f"rl.loss.num_minibatches={self.loss.num_minibatches}: at most "
                f"rl.prompts_per_step={self.prompts_per_step}"
            )
        if self.estimator.name == "dr_grpo" and self.aggregation != "length_constant":
            raise ConfigError(
                f"rl.loss.aggregation={self.loss.aggregation}: rl/estimator=dr_grpo is "
                "length_constant; remove it, or choose rl/estimator=grpo with "
                "rl.estimator.std_normalize=false"
            )

    def _check_rollout(self) -> None:
        if self.rollout.one_step_off and self.steps == 1:
            raise ConfigError(
                "rl.rollout.one_step_off=true with rl.steps=1: the first batch is on-policy; set "
                "more steps or false"
            )
        if self.rollout.one_step_off and self.loss.tis_clip is None:
            raise ConfigError(
                "rl.rollout.one_step_off=true trains on samples of older weights: set "
                "rl.loss.tis_clip (2.0 is usual), which corrects for it"
            )
        dynamic = isinstance(self.rollout.filter, DynamicSampling)
        if dynamic and self.estimator.name == "reinforce_pp":
            raise ConfigError(
                "rl/rollout/filter=dynamic drops groups without advantages, and "
                "rl/estimator=reinforce_pp compares with the whole batch, so that every group has "
                "some: remove one of the two"
            )

    def _check_lengths(self) -> None:
        longest = self.sampling.max_new_tokens
        if isinstance(self.shaping, OverlongShaping) and self.shaping.buffer > longest:
            raise ConfigError(
                f"rl.shaping.buffer={self.shaping.buffer}: at most "
                f"rl.sampling.max_new_tokens={longest}"
            )
        if not isinstance(self.reward, GatedReward):
            return
        rules = self.reward.constraints
        if rules.max_tokens is not None and rules.max_tokens >= longest:
            raise ConfigError(
                f"rl.reward.constraints.max_tokens={rules.max_tokens}: must be below "
                f"rl.sampling.max_new_tokens={longest}, which no response exceeds"
            )
        if rules.min_tokens is not None and rules.min_tokens > longest:
            raise ConfigError(
                f"rl.reward.constraints.min_tokens={rules.min_tokens}: no response can have more "
                f"than rl.sampling.max_new_tokens={longest}"
            )
        if not rules.format_gate and self.advantage.name != "outcome":
            raise ConfigError(
                "rl.reward.constraints.format_gate=false: steps of a text that does not parse have "
                f"no tokens, which rl/advantage={self.advantage.name} needs; choose "
                "rl/advantage=outcome"
            )


register_option("rl/advantage", AdvantageConfig())
for _advantage in (
    SelectiveAdvantage(),
    SelectiveAdvantage(name="selective_half"),
    AdvantageConfig(name="global_step"),
    StepPenaltyAdvantage(),
):
    register_option("rl/advantage", _advantage, needs_step_labels=True)
for _name in ("min_form", "prefix", "capo"):
    register_option(
        "rl/advantage",
        AdvantageConfig(name=_name),
        brings={"rl/estimator": "none"},
        needs_step_labels=True,
    )
for _estimator in (
    EstimatorConfig(),
    GrpoEstimator(),
    EstimatorConfig(name="dr_grpo"),
    EstimatorConfig(name="rloo"),
    EstimatorConfig(name="reinforce_pp"),
):
    register_option("rl/estimator", _estimator)
for _shaping in (ShapingConfig(), OverlongShaping()):
    register_option("rl/shaping", _shaping)
for _kl in (KLConfig(), KLPenalty(name="k1"), KLPenalty(name="k2"), KLPenalty(name="k3")):
    register_option("rl/kl", _kl)
for _loss in (LossConfig(), ClippedLoss()):
    register_option("rl/loss", _loss)
