"""Rewards of stage III (the group ``rl/reward``), their failure policies and held-out verifiers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from .engine import SamplingConfig
from .errors import ConfigError, at_least, in_unit_interval, number_or_auto, one_of
from .hacking import ConstraintsConfig
from .registry import Choice, register_option

VARIANTS = ("prm_cot", "prm", "orm")
"""Kinds of generative reward model; folder names leave the first one out."""


@dataclass
class FailurePolicy(Choice):
    """Treatment of rollouts whose verification gave no verdict (``rl/reward/failures``)."""

    max_rate: float = 0.2
    """Stop the run when a larger share of a step's verifications fail after their retries. Steps
    with fewer than 1 / max_rate verifications are pooled with later steps.
    """

    def __post_init__(self) -> None:
        in_unit_interval("rl.reward.failures.max_rate", self.max_rate)


@dataclass
class MaskFailures(FailurePolicy):
    """Exclude the rollout from the update."""

    name: str = "mask"


@dataclass
class PenalizeFailures(FailurePolicy):
    """Give the rollout a declared reward."""

    name: str = "penalize"
    penalty: float = 0.0
    """Reward of a rollout whose verification failed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.penalty):
            raise ConfigError(f"rl.reward.failures.penalty={self.penalty}: a reward must be finite")


@dataclass
class HeldoutConfig(Choice):
    """A second reward model that never trains the policy (``rl/reward/heldout``)."""

    name: str = "none"


@dataclass
class HeldoutVerifier(HeldoutConfig):
    """Compare the training reward with a second PRM-CoT's at regular intervals."""

    name: str = "verifier"
    model: str = MISSING
    """Folder of the second PRM-CoT; required."""
    every: int | str = "auto"
    """Training steps between two comparisons. auto: rl.eval_every."""
    samples: int = 32
    """Number of responses in one comparison."""
    alarm: float = 0.1
    """Warn when the training reward minus the held-out one has grown by this since the first
    comparison.
    """

    def __post_init__(self) -> None:
        number_or_auto("rl.reward.heldout.every", self.every, 1)
        at_least("rl.reward.heldout.samples", self.samples, 1)
        if not self.alarm > 0:
            raise ConfigError(f"rl.reward.heldout.alarm={self.alarm}: must be positive")


@dataclass
class RewardConfig(Choice):
    """A reward without settings."""


@dataclass
class GatedReward(RewardConfig):
    """A reward behind the format gate."""

    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)


@dataclass
class FallibleReward(RewardConfig):
    """A reward that can fail: a verification without a verdict, or a comparison of answers that
    runs into the checker's limits.
    """

    failures: FailurePolicy = field(default_factory=MaskFailures)


@dataclass
class AnswerKeyReward(FallibleReward):
    """A declared baseline that compares responses with the answers in data.rl_answers."""

    name: str = "rlvr"


@dataclass
class ModelReward(GatedReward, FallibleReward):
    """A reward from the verdicts of a generative reward model."""

    name: str = "process_aware"
    model: str = "auto"
    """Folder of the reward model. auto: the one that stage II makes in run.dir."""
    variant: str = "auto"
    """Kind of the reward model: prm_cot, prm, or orm (no step labels). auto: stage2.variant."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=4096)
    )
    """Sampling of the verifications."""
    votes: int = 1
    """Number of verifications per rollout; step labels and verdict are decided by majority. More
    than one needs sampling.temperature > 0.
    """
    min_votes: int | str = "auto"
    """Minimum verdicts per rollout; with fewer, its verification counts as failed. auto: more than
    half of the votes.
    """
    retries: int = 1
    """Maximum further attempts at a verification that gave no verdict."""
    queue: int | str = "auto"
    """Maximum verifications sent to the engines at once; further ones wait. auto: twice the number
    that the engines decode together.
    """
    deadline_s: float | int | str = "auto"
    """Seconds one verification may take once it is sent. auto: 1800, plus 0.25 for each token that
    it may sample.
    """
    cache: int = 65536
    """Maximum cached verifications, evicted least recently used first; 0 disables the cache."""
    probes: int = 8
    """Problems that adversarial responses are made for, which the reward model scores at every
    evaluation; 0 scores none.
    """
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)

    def __post_init__(self) -> None:
        at_least("rl.reward.votes", self.votes, 1)
        number_or_auto("rl.reward.min_votes", self.min_votes, 1)
        at_least("rl.reward.retries", self.retries, 0)
        number_or_auto("rl.reward.queue", self.queue, 1)
        number_or_auto("rl.reward.deadline_s", self.deadline_s, 0)
        if self.deadline_s != "auto" and not 0 < self.deadline_s < math.inf:
            raise ConfigError(
                f"rl.reward.deadline_s={self.deadline_s}: must be positive and finite"
            )
        at_least("rl.reward.cache", self.cache, 0)
        at_least("rl.reward.probes", self.probes, 0)
        if self.variant != "auto":
            one_of("rl.reward.variant", self.variant, VARIANTS)
        if self.votes > 1 and self.sampling.temperature == 0:
            raise ConfigError(
                f"rl.reward.votes={self.votes}: greedy votes are all the same; set "
                "rl.reward.sampling.temperature above 0 or use one vote"
            )
        if self.votes_needed > self.votes:
            raise ConfigError(
                f"rl.reward.min_votes={self.min_votes}: at most rl.reward.votes={self.votes}"
            )

    @property
    def votes_needed(self) -> int:
        """Verdicts that a rollout needs."""
        return self.votes // 2 + 1 if self.min_votes == "auto" else self.min_votes


register_option("rl/reward", ModelReward())
for _name in ("step_average", "step_augmented"):
    register_option("rl/reward", ModelReward(name=_name), needs_step_labels=True)
register_option("rl/reward", AnswerKeyReward(), reads_answer_keys=True)
register_option("rl/reward", RewardConfig(name="majority"))
register_option("rl/reward", GatedReward(name="random"))
for _policy in (MaskFailures(), PenalizeFailures()):
    register_option("rl/reward/failures", _policy)
for _heldout in (HeldoutConfig(), HeldoutVerifier()):
    register_option("rl/reward/heldout", _heldout)
