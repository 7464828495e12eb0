"""From outcomes to rewards; nothing here knows an answer."""

from .baselines import majority_rewards, random_reward
from .failure_policy import FailureCount, FailureRateExceeded, RewardBatch, apply_failure_policy
from .process_aware import process_aware_reward
from .rlvr import Checker, rlvr_rewards
from .step_rewards import step_augmented_reward, step_average_reward
from .votes import aggregate_votes

__all__ = [
    "Checker",
    "FailureCount",
    "FailureRateExceeded",
    "RewardBatch",
    "aggregate_votes",
    "apply_failure_policy",
    "majority_rewards",
    "process_aware_reward",
    "random_reward",
    "rlvr_rewards",
    "step_augmented_reward",
    "step_average_reward",
]
