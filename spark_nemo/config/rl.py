"""Stage III: rewards, advantages, loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import attrgetter

from .designs import (
    ADVANTAGES,
    BASELINES,
    MODEL_REWARDS,
    NEEDS_STEP_LABELS,
    OWN_BASELINE,
    STEP_BOUNDS,
    VARIANTS,
    VERIFIER_KNOBS,
    unread_failures,
)
from .engine import SamplingConfig
from .errors import ConfigError, at_least, in_unit_interval, one_of, without_effect
from .hacking import HackingConfig
from .rollout import RolloutConfig
from .trainer import OptimizerConfig


@dataclass
class FailurePolicy:
    """What a verification that gave no verdict costs. Nothing becomes a score unless this says so.

    Read where a reward model is asked; of the baselines only rlvr, whose answer checker may give no
    answer, reads it, without ``retries``.
    """

    action: str | None = None
    """mask: leave the sample out. penalize: give it ``penalty``. None is mask."""
    penalty: float | None = None
    retries: int | None = None
    """Fresh attempts before the action applies. None is 1."""
    max_rate: float | None = None
    """The run stops when more than this share of a step's verifications fail after their retries. A
    step with so few that one failure alone would be above it is judged together with the next ones;
    at the end all count. None is 0.2.
    """

    def __post_init__(self) -> None:
        if self.action is not None:
            one_of("failures.action", self.action, {"mask", "penalize"})
        at_least("failures.retries", self.num_retries, 0)
        in_unit_interval("failures.max_rate", self.bound)
        if self.action == "penalize" and self.penalty is None:
            raise ConfigError(
                "failures.action=penalize needs failures.penalty (the reward of a failed verification)"
            )
        if self.penalty is not None and not math.isfinite(self.penalty):
            raise ConfigError(f"failures.penalty={self.penalty}: a reward must be finite")
        if self.masks and self.penalty is not None:
            raise without_effect("failures.penalty", self.penalty, "with failures.action=mask")

    @property
    def masks(self) -> bool:
        """``action``, resolved: is a sample without a verdict left out?"""
        return self.action != "penalize"

    @property
    def num_retries(self) -> int:
        """``retries``, resolved."""
        return 1 if self.retries is None else self.retries

    @property
    def bound(self) -> float:
        """``max_rate``, resolved."""
        return 0.2 if self.max_rate is None else self.max_rate


@dataclass
class RLConfig:
    """GRPO. The names follow the field: a *group* is the rollouts of one prompt."""

    steps: int = 100
    prompts_per_step: int = 256
    group_size: int = 16
    num_minibatches: int = 1
    """Optimizer steps per rollout batch; the batch is split by groups."""
    reward: str = "process_aware"
    """From the reward model: process_aware (format gate times final verdict), step_average,
    step_augmented. Baselines: rlvr (answer key, declared), majority (the group's own majority
    answer), random (a coin).
    """
    advantage: str = "outcome"
    """Per response: outcome. Per token, from step labels: selective, selective_half, global_step,
    global_step_penalty, min_form, prefix or capo; all are defined on rl.reward=process_aware.
    """
    reward_model: str | None = None
    """Folder of the reward model; None takes stage II's result in ``run.dir``. Baselines have none.
    """
    reward_variant: str | None = None
    """What kind of reward model is asked: prm_cot, prm, or orm, which has no step labels. None is
    stage2.variant. Baselines have none.
    """
    selective_min_steps: int | None = None
    """Of selective and selective_half: a response of fewer steps has outcome reward 0. None is no
    bound, as in the paper; the published code has 4.
    """
    selective_max_steps: int | None = None
    """The same for more steps; the published code has 20. A step that is split may cross either
    bound.
    """
    step_penalty_min: int | None = None
    """Of global_step_penalty: a response of fewer steps has no step rewards. None is 3, as in the
    published code.
    """
    step_penalty_max: int | None = None
    """The same for more steps. None is 20."""
    overlong_buffer: int | None = None
    """DAPO's soft over-long punishment, added to the reward: over the last so many tokens before
    rl.sampling.max_new_tokens it falls from 0 to -1. None adds nothing."""
    prompt_set: str = "paper"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    verifier_sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=4096)
    )
    """How the reward model is sampled as a reward; not read by the baselines."""
    verifier_votes: int = 1
    """Verifications of every rollout; step labels and the verdict are the majority's. More than one
    needs verifier_sampling.temperature > 0.
    """
    verifier_min_votes: int | None = None
    """Verdicts that a rollout needs; with fewer it counts as a failed verification. None is more
    than half of the votes.
    """
    verifier_queue: int | None = None
    """Verifications at the engines at once; the others wait for a place. None is twice what they
    decode together.
    """
    verifier_deadline: float | None = None
    """Seconds a verification may take once it has its place; then it is an EngineError. None is
    1800, and 0.25 for each token that it may sample.
    """
    verifier_cache: int | None = None
    """Verification results that are remembered (the least recently used one goes first). 0 is off,
    None is 65536.
    """
    failures: FailurePolicy = field(default_factory=FailurePolicy)
    estimator: str = "grpo"
    """From rewards to one advantage per response: grpo, dr_grpo (no std), rloo or reinforce_pp
    (batch statistics).
    """
    std_normalize: bool | None = None
    """Divide a group's centred rewards by their standard deviation; only read by grpo. None is
    True.
    """
    loss_aggregation: str | None = None
    """token_mean, sequence_mean or length_constant. None is token_mean; dr_grpo is length_constant
    and nothing else.
    """
    importance_sampling_level: str = "token"
    """What is clipped: token, or sequence (GSPO; its objective is the one with
    loss_aggregation=sequence_mean). Only read when num_minibatches > 1.
    """
    clip_low: float | None = None
    """Lower clip of the ratio, 1 - clip_low; only read when num_minibatches > 1. None is 0.2."""
    clip_high: float | None = None
    """Upper clip of the ratio, 1 + clip_high; only read when num_minibatches > 1. None is 0.2."""
    kl_estimator: str = "none"
    """Estimator of KL(policy, reference) in the loss: none, k1, k2 or k3."""
    kl_coef: float | None = None
    tis_clip: float | None = 2.0
    """Truncated importance sampling between engine and trainer log-probabilities; None switches it
    off.
    """
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    eval_every: int = 10
    save_every: int = 50
    hacking: HackingConfig = field(default_factory=HackingConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "num_minibatches", "eval_every", "save_every"):
            at_least(f"rl.{name}", getattr(self, name), 1)
        at_least("rl.group_size", self.group_size, 2)
        one_of("rl.reward", self.reward, MODEL_REWARDS | BASELINES)
        if self.loss_aggregation is not None:
            one_of(
                "rl.loss_aggregation",
                self.loss_aggregation,
                {"token_mean", "sequence_mean", "length_constant"},
            )
        one_of("rl.kl_estimator", self.kl_estimator, {"none", "k1", "k2", "k3"})
        one_of("rl.prompt_set", self.prompt_set, {"paper", "compact"})
        if self.kl_estimator == "none" and self.kl_coef is not None:
            raise without_effect("rl.kl_coef", self.kl_coef, "with rl.kl_estimator=none")
        if self.kl_estimator != "none" and not 0 < (self.kl_coef or 0) < math.inf:
            raise ConfigError(
                f"rl.kl_estimator={self.kl_estimator} needs a positive, finite rl.kl_coef, "
                f"not rl.kl_coef={self.kl_coef}"
            )
        if self.num_minibatches > self.prompts_per_step:
            raise ConfigError(
                f"rl.num_minibatches={self.num_minibatches}: at most rl.prompts_per_step={self.prompts_per_step}"
            )
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if value is not None and self.num_minibatches == 1:
                raise without_effect(
                    f"rl.{name}", value, "with rl.num_minibatches=1 (the ratio is always 1)"
                )
            if value is not None and not value > 0:
                raise ConfigError(f"rl.{name}={value}: must be positive")
        if self.tis_clip is not None:
            at_least("rl.tis_clip", self.tis_clip, 1)
        self._check_verifier()
        self._check_estimator()
        self._check_advantage()
        self._check_shaping()
        self.rollout.check(self.steps, self.tis_clip, self.estimator)
        self.hacking.check_rl(
            self.reward,
            self.advantage,
            self.sampling.max_new_tokens,
            asks_reward_model=self.asks_reward_model,
        )

    @property
    def asks_reward_model(self) -> bool:
        """Is the reward made from a reward model's verdicts?"""
        return self.reward in MODEL_REWARDS

    @property
    def design(self) -> str:
        """What an arm of the pipeline is called after: the advantage where it reads step labels,
        else the reward.
        """
        return self.reward if self.advantage == "outcome" else self.advantage

    @property
    def step_penalty_bounds(self) -> tuple[int, int]:
        """``step_penalty_min`` and ``step_penalty_max``, resolved."""
        return self.step_penalty_min or 3, self.step_penalty_max or 20

    @property
    def min_votes(self) -> int:
        """``verifier_min_votes``, resolved."""
        return self.verifier_min_votes or self.verifier_votes // 2 + 1

    @property
    def aggregation(self) -> str:
        """``loss_aggregation``, resolved."""
        return self.loss_aggregation or (
            "length_constant" if self.estimator == "dr_grpo" else "token_mean"
        )

    def _check_verifier(self) -> None:
        at_least("rl.verifier_votes", self.verifier_votes, 1)
        for name, bound in (
            ("verifier_min_votes", 1),
            ("verifier_queue", 1),
            ("verifier_cache", 0),
        ):
            if (value := getattr(self, name)) is not None:
                at_least(f"rl.{name}", value, bound)
        if self.verifier_deadline is not None and not 0 < self.verifier_deadline < math.inf:
            raise ConfigError(
                f"rl.verifier_deadline={self.verifier_deadline}: must be positive and finite"
            )
        if not self.asks_reward_model:
            for name, unset in {
                **VERIFIER_KNOBS,
                "reward_model": None,
                "reward_variant": None,
            }.items():
                if (value := getattr(self, name)) != unset:
                    raise without_effect(f"rl.{name}", value, f"with rl.reward={self.reward}")
        for name in unread_failures(self.reward):
            if (value := attrgetter(name)(self)) is not None:
                raise without_effect(
                    f"rl.{name}",
                    value,
                    f"with rl.reward={self.reward}, which asks no reward model "
                    "(null unsets what a recipe has set)",
                )
        if self.reward_variant is not None:
            one_of("rl.reward_variant", self.reward_variant, VARIANTS)
            check_variant(self.design, self.reward_variant, "rl.reward_variant")
        if self.verifier_votes > 1 and self.verifier_sampling.temperature == 0:
            raise ConfigError(
                f"rl.verifier_votes={self.verifier_votes}: greedy votes are all the same; give "
                "rl.verifier_sampling.temperature a positive value or ask for one vote"
            )
        if self.verifier_min_votes is not None and self.verifier_votes == 1:
            raise without_effect(
                "rl.verifier_min_votes", self.verifier_min_votes, "with rl.verifier_votes=1"
            )
        if (self.verifier_min_votes or 1) > self.verifier_votes:
            raise ConfigError(
                f"rl.verifier_min_votes={self.verifier_min_votes}: at most "
                f"rl.verifier_votes={self.verifier_votes}"
            )

    def _check_estimator(self) -> None:
        one_of("rl.estimator", self.estimator, {"grpo", "dr_grpo", "rloo", "reinforce_pp"})
        one_of(
            "rl.importance_sampling_level", self.importance_sampling_level, {"token", "sequence"}
        )
        if self.importance_sampling_level != "token" and self.num_minibatches == 1:
            raise without_effect(
                "rl.importance_sampling_level",
                self.importance_sampling_level,
                "with rl.num_minibatches=1 (the ratio is always 1)",
            )
        if self.std_normalize is not None and self.estimator != "grpo":
            raise without_effect(
                "rl.std_normalize", self.std_normalize, f"with rl.estimator={self.estimator}"
            )
        if self.estimator == "dr_grpo" and self.aggregation != "length_constant":
            raise ConfigError(
                f"rl.loss_aggregation={self.loss_aggregation}: dr_grpo is length_constant; remove it or "
                "choose rl.estimator=grpo with rl.std_normalize=false"
            )

    def _check_advantage(self) -> None:
        one_of("rl.advantage", self.advantage, {"outcome"} | ADVANTAGES)
        if self.advantage != "outcome" and self.reward != "process_aware":
            raise ConfigError(
                f"rl.advantage={self.advantage} reads step labels and the verdict as its reward: "
                f"choose rl.reward=process_aware instead of {self.reward}, or rl.advantage=outcome"
            )
        if self.advantage in OWN_BASELINE:
            because = f"with rl.advantage={self.advantage} (it has a baseline of its own)"
            if self.estimator != "grpo":
                raise without_effect("rl.estimator", self.estimator, because)
            if self.std_normalize is not None:
                raise without_effect("rl.std_normalize", self.std_normalize, because)

    def _check_shaping(self) -> None:
        for name, readers in STEP_BOUNDS.items():
            if (value := getattr(self, name)) is not None:
                at_least(f"rl.{name}", value, 1)
                if self.design not in readers:
                    raise without_effect(
                        f"rl.{name}",
                        value,
                        f"with the reward design {self.design}: only "
                        f"{', '.join(sorted(readers))} reads it",
                    )
        low, high = self.step_penalty_bounds
        for names, bounds in (
            ("selective_", (self.selective_min_steps, self.selective_max_steps)),
            ("step_penalty_", (low, high)),
        ):
            if None not in bounds and bounds[0] > bounds[1]:
                raise ConfigError(
                    f"rl.{names}*: at least {bounds[0]} steps and at most {bounds[1]} leaves no response"
                )
        if self.overlong_buffer is None:
            return
        if not 1 <= self.overlong_buffer <= self.sampling.max_new_tokens:
            raise ConfigError(
                f"rl.overlong_buffer={self.overlong_buffer}: must lie in 1.."
                f"{self.sampling.max_new_tokens}, the tokens of rl.sampling.max_new_tokens"
            )
        if self.advantage in OWN_BASELINE:
            raise ConfigError(
                f"rl.overlong_buffer={self.overlong_buffer}: rl.advantage={self.advantage} takes the "
                "reward for the verdict, which a punishment of length would falsify; remove it"
            )


def check_variant(design: str, variant: str, field: str) -> None:
    """Raise ``ConfigError`` that names ``field`` when the design needs step labels and the variant
    gives none.
    """
    if variant == "orm" and design in NEEDS_STEP_LABELS:
        raise ConfigError(
            f"{field}=orm: an ORM labels no steps, which the reward design {design} is made of; choose "
            "prm or prm_cot, or the design process_aware"
        )
