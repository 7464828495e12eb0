"""Rollout schedule of stage III: dynamic sampling, and one step off-policy."""

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
    """Replace groups whose rewards are all equal, which have no training signal (DAPO)."""

    name: str = "dynamic"
    over_sampling_ratio: float = 1.5
    """Prompts started at once, as a multiple of the missing groups. The step keeps the first useful
    groups in prompt order and aborts the rest. 1 starts exactly the missing groups.
    """
    max_rounds: int = 4
    """Maximum rounds of sampling for missing groups; then the step trains on fewer groups."""

    def __post_init__(self) -> None:
        if not 1 <= self.over_sampling_ratio < math.inf:
            raise ConfigError(
                f"rl.rollout.filter.over_sampling_ratio={self.over_sampling_ratio}: "
                "must be at least 1"
            )
        at_least("rl.rollout.filter.max_rounds", self.max_rounds, 1)

    def started(self, missing: int) -> int:
        """Return the number of prompts to start for ``missing`` useful groups."""
        return math.ceil(self.over_sampling_ratio * missing)


@dataclass
class RolloutConfig:
    """Rollout schedule; by default a step trains on groups sampled by the newest weights."""

    one_step_off: bool = False
    """While step k trains, generate and verify the batch of step k + 1 with the weights from before
    step k. ``rl.loss.tis_clip`` corrects for the difference. Only the first batch is on-policy.
    """
    filter: GroupFilter = field(default_factory=GroupFilter)


for _filter in (GroupFilter(), DynamicSampling()):
    register_option("rl/rollout/filter", _filter)
