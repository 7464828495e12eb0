"""What verifications without a verdict cost a batch, as the configuration declares it."""

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
    """Which verifications of a run failed, by kind, and when their share ends the run.

    A step is judged by its own verifications, unless they are so few that one failure alone would
    be above the bound (fewer than 1 / bound): then they wait and are judged together with those of
    the next steps. At the end all of the run's are judged, however few. A bound of 0 allows no
    failure at all and waits for none.
    """

    failed: Counter[str] = field(default_factory=Counter)
    total: int = 0
    waiting_failed: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    """Verifications that nobody has judged yet; they are in ``total`` too."""

    def add(self, scores: Sequence[float | Failure], num_verifications: int, bound: float) -> None:
        """Count a step. Raises ``FailureRateExceeded`` when what can be judged now is above
        ``bound``.
        """
        failed = failures_by_kind(scores)
        self.failed += failed
        self.total += num_verifications
        self.waiting_failed += failed
        self.waiting += num_verifications
        if bound == 0 or self.waiting * bound >= 1:
            _judge(self.waiting_failed, self.waiting, bound)
            self.waiting_failed, self.waiting = Counter(), 0

    def finish(self, bound: float) -> None:
        """Raise ``FailureRateExceeded`` when the whole run's share is above ``bound``."""
        _judge(self.failed, self.total, bound)

    def to_json(self) -> dict[str, object]:
        """For a checkpoint: a run that goes on counts on."""
        return {
            "failed": dict(self.failed),
            "total": self.total,
            "waiting_failed": dict(self.waiting_failed),
            "waiting": self.waiting,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FailureCount:
        """Inverse of ``to_json``."""
        return cls(
            Counter(data["failed"]), data["total"], Counter(data["waiting_failed"]), data["waiting"]
        )


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Rewards of N samples. A masked sample has reward NaN, so that using it by mistake cannot go
    unnoticed.

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
    """How many of the scores are a failure of each kind."""
    return Counter(outcome_kind(score) for score in scores if isinstance(score, Failure))


def apply_failure_policy(
    scores: Sequence[float | Failure],
    policy: FailurePolicy,
    *,
    num_verifications: int | None = None,
) -> RewardBatch:
    """Turn scores into rewards and a valid mask: a ``Failure`` is masked or gets the declared
    penalty.

    ``num_verifications`` is how many of the samples were shown to the verifier (those stopped by
    the format gate were not); None means all. Rates are shares of that number. Whether there are
    too many is for ``FailureCount``.
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
            f"{failed.total() / total:.1%} of {total} verifications failed (mostly {kind}: {count}), above "
            f"rl.reward.failures.max_rate={bound}: fix the verifier or raise the bound"
        )
