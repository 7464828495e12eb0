"""What a store of stage I holds, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from spark_nemo.records import SOLUTION, VERIFICATION, ParseFailure, Solution
from spark_nemo.records.store import RecordStore

from .sampler import parse_solution


@dataclass(slots=True)
class StoreStatistics:
    """Counts by kind of record. ``failures`` are by kind and reason: for a solution why it has no
    steps, for anything with an outcome the outcome's kind and, of a parse failure, the rule that
    was broken.
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
        number = tokens = 0
        for _, payload in store.iter(kind):
            number += 1
            tokens += int(payload.get("num_tokens", 0))
            outcome, reason = outcome_and_reason(kind, payload)
            outcomes[outcome] += 1
            if reason is not None:
                failures[reason] += 1
        statistics.records[kind], statistics.tokens[kind] = number, tokens
        if set(outcomes) != {""}:
            statistics.outcomes[kind], statistics.failures[kind] = (
                dict(outcomes),
                dict(failures.most_common()),
            )
        usable = outcomes["usable"] if kind == SOLUTION else usable
    votes = store.children_per_parent(VERIFICATION)
    without = usable - sum(votes.values())
    statistics.votes_per_solution = {
        **({0: without} if without > 0 else {}),
        **dict(sorted(votes.items())),
    }
    for (shard, kind), number in sorted(store.counts().items()):
        statistics.shards.setdefault(shard, {})[kind] = number
    return statistics


def outcome_and_reason(kind: str, payload: dict[str, object]) -> tuple[str, str | None]:
    """The outcome of a record (empty when its kind has none), and of a failure the reason without
    its particulars.
    """
    if kind == SOLUTION:
        parsed = parse_solution(Solution.from_json(payload))
        return (
            ("unusable", _rule(parsed.reason))
            if isinstance(parsed, ParseFailure)
            else ("usable", None)
        )
    outcome = payload.get("outcome")
    if not isinstance(outcome, dict):
        return "", None
    name = str(outcome.get("kind"))
    if name == "verdict":
        return name, None
    reason = outcome.get("reason") or outcome.get("rule")
    return name, f"{name}: {_rule(str(reason))}" if reason else name


def _rule(reason: str) -> str:
    """``step_count: 3 steps judged, 2 in the solution`` is ``step_count``; a finish reason is
    whole.
    """
    return reason if reason.startswith("finish_reason") else reason.partition(":")[0]
