"""Failure policy: rewards of rollouts without a verdict, and the run's maximum failure rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spark_nemo.config.reward import FailurePolicy, PenalizeFailures
from spark_nemo.records import Failure, outcome_kind


class FailureRateExceeded(RuntimeError):
    """More verifications failed than ``rl.reward.failures.max_rate`` allows."""


@dataclass
class FailureCount:
    """Failed verifications of a run by kind, checked against a maximum rate.

    The rate is checked after every step. Steps with fewer than 1 / bound verifications, where one
    failure alone would exceed the bound, are pooled with later steps. At the end the whole run's
    rate is checked. A bound of 0 allows no failure and is checked after every step.
    """

    failed: Counter[str] = field(default_factory=Counter)
    total: int = 0
    waiting_failed: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    """Verifications of pooled steps that were not checked yet; ``total`` includes them."""

    def add(self, scores: Sequence[float | Failure], num_verifications: int, bound: float) -> None:
        """Count a step. Raises ``FailureRateExceeded`` if its failure rate is above ``bound``."""
        failed = failures_by_kind(scores)
        self.failed += failed
        self.total += num_verifications
        self.waiting_failed += failed
        self.waiting += num_verifications
        if bound == 0 or self.waiting * bound >= 1:
            _judge(self.waiting_failed, self.waiting, bound)
            self.waiting_failed, self.waiting = Counter(), 0

    def finish(self, bound: float) -> None:
        """Raise ``FailureRateExceeded`` if the whole run's failure rate is above ``bound``."""
        _judge(self.failed, self.total, bound)

    def to_json(self) -> dict[str, object]:
        """Return the counts for a checkpoint, so that a resumed run continues them."""
        return {
            "failed": dict(self.failed),
            "total": self.total,
            "waiting_failed": dict(self.waiting_failed),
            "waiting": self.waiting,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FailureCount:
        """Return the counts that ``to_json`` wrote."""
        return cls(
            Counter(data["failed"]), data["total"], Counter(data["waiting_failed"]), data["waiting"]
        )


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Rewards of N samples; a masked sample has reward NaN, so that accidental use shows.

    ``failure_rates`` maps each kind of failure (``parse_failure``, ...) to its share of the
    verifications.
    """

    rewards: tuple[float, ...]
    valid: tuple[bool, ...]
    failure_rates: dict[str, float]

    @property
    def failure_rate(self) -> float:
        """Share of the verifications that gave no verdict."""
        return sum(self.failure_rates.values())


def failures_by_kind(scores: Sequence[float | Failure]) -> Counter[str]:
    """Count the failures among the scores by kind."""
    return Counter(outcome_kind(score) for score in scores if isinstance(score, Failure))


def apply_failure_policy(
    scores: Sequence[float | Failure],
    policy: FailurePolicy,
    *,
    num_verifications: int | None = None,
) -> RewardBatch:
    """Turn scores into rewards and a valid mask: mask a ``Failure``, or give it the penalty.

    ``num_verifications`` is the number of samples that the verifier received, which excludes those
    that the format gate rejected; None means all. Failure rates are shares of that number.
    ``FailureCount`` checks the rates.
    """
    total = len(scores) if num_verifications is None else num_verifications
    failed = failures_by_kind(scores)
    if failed.total() > total:
        raise ValueError(
            f"num_verifications={total}: fewer than the {failed.total()} failures in the batch"
        )
    rates = {kind: count / total for kind, count in sorted(failed.items())}
    masked = not isinstance(policy, PenalizeFailures)
    cost = math.nan if masked else policy.penalty
    rewards = tuple(cost if isinstance(score, Failure) else float(score) for score in scores)
    return RewardBatch(
        rewards, tuple(not (masked and isinstance(score, Failure)) for score in scores), rates
    )


def _judge(failed: Counter[str], total: int, bound: float) -> None:
    if failed and failed.total() / total > bound:
        kind, count = failed.most_common(1)[0]
        raise FailureRateExceeded(
            f"{failed.total() / total:.1%} of {total} verifications failed (mostly {kind}: "
            f"{count}), above rl.reward.failures.max_rate={bound}: fix the verifier or raise the "
            "bound"
        )
