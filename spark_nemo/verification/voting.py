"""Shares of failed outcomes; the votes themselves are counted in ``records.voting``, which the
rewards use too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from spark_nemo.records import Outcome, Verdict, VoteCount, count_votes, majority, outcome_kind

__all__ = ["VoteCount", "count_votes", "failure_rates", "majority"]


def failure_rates(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of all outcomes that failed, by kind; kinds that did not occur are absent. No outcomes,
    no rates.
    """
    failures = Counter(
        outcome_kind(outcome) for outcome in outcomes if not isinstance(outcome, Verdict)
    )
    return {kind: count / len(outcomes) for kind, count in sorted(failures.items())}
