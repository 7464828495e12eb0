"""How stage III schedules its rollouts: dynamic sampling, and one step off-policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .errors import ConfigError, at_least
from .registry import Choice, register_option


@dataclass
class GroupFilter(Choice):
    """Train on every group (``rl/rollout/filter=none``)."""

    name: str = "none"


@dataclass
class DynamicSampling(GroupFilter):
    """Replace groups whose rewards are all equal, which train nothing (DAPO)."""

    name: str = "dynamic"
    over_sampling_ratio: float = 1.5
    """Start this many times the missing prompts at once. Of the useful groups the first in prompt
    order are kept, and what still decodes then is aborted. 1 starts no more than is missing.
    """
    max_rounds: int = 4
    """Rounds of sampling for missing groups; after them the step trains on fewer groups."""

    def __post_init__(self) -> None:
        if not 1 <= self.over_sampling_ratio < math.inf:
            raise ConfigError(
                f"rl.rollout.filter.over_sampling_ratio={self.over_sampling_ratio}: must be at least 1"
            )
        at_least("rl.rollout.filter.max_rounds", self.max_rounds, 1)

    def started(self, missing: int) -> int:
        """Return the number of prompts to start for ``missing`` useful groups."""
        return math.ceil(self.over_sampling_ratio * missing)


@dataclass
class RolloutConfig:
    """By default a step trains on ``rl.prompts_per_step`` groups sampled by the newest weights."""

    one_step_off: bool = False
    """While step k trains, generate and verify the batch of step k + 1 with the weights that step k
    began with. ``rl.loss.tis_clip`` corrects for it. Only the first batch is on-policy.
    """
    filter: GroupFilter = field(default_factory=GroupFilter)


for _filter in (GroupFilter(), DynamicSampling()):
    register_option("rl/rollout/filter", _filter)
