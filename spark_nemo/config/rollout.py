"""How stage III schedules its rollouts: dynamic sampling, and one step off-policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError, at_least, without_effect

DEFAULT_MAX_ROUNDS = 4


@dataclass
class RolloutConfig:
    """Neither is on unless it is set; then a step trains on ``rl.prompts_per_step`` groups by the
    newest weights.
    """

    one_step_off: bool = False
    """While step k trains, the batch of step k + 1 is generated and verified with the weights that
    step k began with; ``rl.tis_clip`` corrects for it. The first batch is the only one
    on-policy.
    """
    over_sampling_ratio: float | None = None
    """Dynamic sampling (DAPO): a group without advantages (its rewards are all equal) trains
    nothing and is replaced. This many times the missing prompts are started at once; of the useful
    groups the first in prompt order are kept, and what still decodes then is aborted. 1 starts no
    more than is missing. None keeps every group.
    """
    max_rounds: int | None = None
    """How often missing groups are started anew before the step trains on fewer; only read with
    over_sampling_ratio. None is 4.
    """

    def __post_init__(self) -> None:
        if self.over_sampling_ratio is not None and not 1 <= self.over_sampling_ratio < math.inf:
            raise ConfigError(
                f"rl.rollout.over_sampling_ratio={self.over_sampling_ratio}: at least 1"
            )
        if self.max_rounds is not None:
            if self.over_sampling_ratio is None:
                raise without_effect(
                    "rl.rollout.max_rounds",
                    self.max_rounds,
                    "without rl.rollout.over_sampling_ratio",
                )
            at_least("rl.rollout.max_rounds", self.max_rounds, 1)

    @property
    def rounds(self) -> int:
        """``max_rounds``, resolved."""
        return self.max_rounds or DEFAULT_MAX_ROUNDS

    def started(self, missing: int) -> int:
        """Prompts to start when ``missing`` useful groups are."""
        return math.ceil((self.over_sampling_ratio or 1) * missing)

    def check(self, steps: int, tis_clip: float | None, estimator: str) -> None:
        """Raise ``ConfigError`` for what does not go with these settings of ``rl``."""
        if self.one_step_off and steps == 1:
            raise without_effect(
                "rl.rollout.one_step_off", True, "with rl.steps=1 (the first batch is on-policy)"
            )
        if self.one_step_off and tis_clip is None:
            raise ConfigError(
                "rl.rollout.one_step_off trains on samples of older weights: set rl.tis_clip "
                "(2.0 is usual), which corrects for it"
            )
        if self.over_sampling_ratio is not None and estimator == "reinforce_pp":
            raise ConfigError(
                f"rl.rollout.over_sampling_ratio={self.over_sampling_ratio} drops groups without advantages, and "
                "rl.estimator=reinforce_pp compares with the whole batch, so that every group has some: "
                "remove one of the two"
            )
