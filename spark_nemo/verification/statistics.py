"""Statistics of a stage I store."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from spark_nemo.records import SOLUTION, VERIFICATION, ParseFailure, Solution
from spark_nemo.records.store import RecordStore

from .sampler import parse_solution


@dataclass(slots=True)
class StoreStatistics:
    """Counts by kind of record.

    ``failures`` are by kind and reason: why a solution has no steps, or the kind of a failed
    outcome and the grammar rule that was broken.
    """

    records: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    votes_per_solution: dict[int, int] = field(default_factory=dict)
    """Number of usable solutions by their number of verifications."""
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    corrupt_records: int = 0
    torn_tails: int = 0


def store_statistics(store: RecordStore) -> StoreStatistics:
    """Count everything in one pass over the store. Memory does not grow with the records."""
    statistics = StoreStatistics(corrupt_records=store.corrupt_records, torn_tails=store.torn_tails)
    usable = 0
    for kind in sorted(store.kinds()):
        outcomes: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        number = 0
        tokens = 0
        for _, payload in store.iter(kind):
            number += 1
            tokens += int(payload.get("num_tokens", 0))
            outcome, reason = outcome_and_reason(kind, payload)
            outcomes[outcome] += 1
            if reason is not None:
                failures[reason] += 1
        statistics.records[kind] = number
        statistics.tokens[kind] = tokens
        if set(outcomes) != {""}:
            statistics.outcomes[kind] = dict(outcomes)
            statistics.failures[kind] = dict(failures.most_common())
        if kind == SOLUTION:
            usable = outcomes["usable"]
    votes = store.children_per_parent(VERIFICATION)
    without_votes = usable - sum(votes.values())
    if without_votes > 0:
        votes[0] = without_votes
    statistics.votes_per_solution = dict(sorted(votes.items()))
    for (shard, kind), number in sorted(store.counts().items()):
        statistics.shards.setdefault(shard, {})[kind] = number
    return statistics


def outcome_and_reason(kind: str, payload: dict[str, object]) -> tuple[str, str | None]:
    """Outcome of a record (empty if its kind has none), and the reason of a failure."""
    if kind == SOLUTION:
        parsed = parse_solution(Solution.from_json(payload))
        if isinstance(parsed, ParseFailure):
            return "unusable", _rule(parsed.reason)
        return "usable", None
    outcome = payload.get("outcome")
    if not isinstance(outcome, dict):
        return "", None
    name = str(outcome.get("kind"))
    if name == "verdict":
        return name, None
    reason = outcome.get("reason") or outcome.get("rule")
    return name, f"{name}: {_rule(str(reason))}" if reason else name


def _rule(reason: str) -> str:
    """Reason without its details: ``step_count: 3 steps judged, ...`` is ``step_count``."""
    return reason if reason.startswith("finish_reason") else reason.partition(":")[0]
