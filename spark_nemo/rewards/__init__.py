"""Rewards from verification outcomes; only declared baselines read answer keys."""

from .designs import (
    Checker,
    RewardContext,
    compute_scores,
    majority_rewards,
    process_aware_reward,
    random_reward,
    rlvr_rewards,
    step_augmented_reward,
    step_average_reward,
)
from .failure_policy import FailureCount, FailureRateExceeded, RewardBatch, apply_failure_policy

__all__ = [
    "Checker",
    "FailureCount",
    "FailureRateExceeded",
    "RewardBatch",
    "RewardContext",
    "apply_failure_policy",
    "compute_scores",
    "majority_rewards",
    "process_aware_reward",
    "random_reward",
    "rlvr_rewards",
    "step_augmented_reward",
    "step_average_reward",
]
