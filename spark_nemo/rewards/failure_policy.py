"""What verifications without a verdict cost a batch, as the configuration declares it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.config import FailurePolicy
from spark_nemo.records import Failure, outcome_kind


class FailureRateExceeded(RuntimeError):
    """More verifications of one step failed than ``rl.failures.max_rate`` allows."""


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Rewards of N samples. A masked sample has reward NaN, so that using it by mistake cannot go unnoticed.

    ``failure_rates`` maps each kind of failure (``parse_failure``, ...) to its share of the verifications.
    """

    rewards: tuple[float, ...]
    valid: tuple[bool, ...]
    failure_rates: dict[str, float]

    @property
    def failure_rate(self) -> float:
        """Share of the verifications that gave no verdict."""
        return sum(self.failure_rates.values())


def apply_failure_policy(
    scores: Sequence[float | Failure], policy: FailurePolicy, *, num_verifications: int | None = None,
) -> RewardBatch:
    """Turn scores into rewards and a valid mask: a ``Failure`` is masked or gets the declared penalty.

    ``num_verifications`` is how many of the samples were shown to the verifier (those stopped by the format gate were
    not); None means all. Rates are shares of that number.

    Raises ``FailureRateExceeded`` when the failures' share is above ``policy.max_rate``.
    """
    total = len(scores) if num_verifications is None else num_verifications
    failed = Counter(outcome_kind(score) for score in scores if isinstance(score, Failure))
    if failed.total() > total:
        raise ValueError(f"num_verifications={total}: fewer than the {failed.total()} failures in the batch")
    rates = {kind: count / total for kind, count in sorted(failed.items())}
    if failed and failed.total() / total > policy.bound:
        kind, count = failed.most_common(1)[0]
        raise FailureRateExceeded(
            f"{failed.total() / total:.1%} of {total} verifications failed (mostly {kind}: {count}), above "
            f"rl.failures.max_rate={policy.bound}: fix the verifier or raise the bound")
    masked = policy.masks
    cost = math.nan if masked else policy.penalty
    rewards = tuple(cost if isinstance(score, Failure) else float(score) for score in scores)
    return RewardBatch(rewards, tuple(not (masked and isinstance(score, Failure)) for score in scores), rates)
