"""What stage I spent: tokens and seconds per request, problem, solution and label, in memory that
does not grow.

Tokens are those of prompts and of completions, sampled in this run or reused from the store.
Seconds are those a request of this run was in flight, waiting inside the engine included; with many
in flight their sum is far above the seconds that passed. A *label* is a solution all of whose votes
are in (or decided): what the labelling methods read.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field

_RATIO = 1.02
_QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(slots=True)
class Cost:
    """Requests and what they took. ``failed`` requests gave nothing; their seconds count, their
    tokens are unknown.
    """

    sampled: int = 0
    sampled_prompt_tokens: int = 0
    sampled_completion_tokens: int = 0
    seconds: float = 0.0
    failed: int = 0
    reused: int = 0
    reused_prompt_tokens: int = 0
    reused_completion_tokens: int = 0
    reused_prompts_unknown: int = 0
    """Reused records that do not say how long their prompt was; their prompt tokens are counted as
    none.
    """

    def add_sampled(self, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """One request that was served in this run."""
        self.sampled += 1
        self.sampled_prompt_tokens += prompt_tokens
        self.sampled_completion_tokens += completion_tokens
        self.seconds += seconds

    def add_failed(self, seconds: float) -> None:
        """One request that the engine did not serve."""
        self.failed += 1
        self.seconds += seconds

    def add_reused(self, prompt_tokens: int | None, completion_tokens: int) -> None:
        """One result that was in the store."""
        self.reused += 1
        self.reused_prompt_tokens += prompt_tokens or 0
        self.reused_completion_tokens += completion_tokens
        self.reused_prompts_unknown += prompt_tokens is None

    def add(self, other: Cost) -> None:
        """Add every figure of ``other``."""
        for name in Cost.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def prompt_tokens(self) -> int:
        """Sampled and reused."""
        return self.sampled_prompt_tokens + self.reused_prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Sampled and reused."""
        return self.sampled_completion_tokens + self.reused_completion_tokens


class Distribution:
    """Mean, extremes and percentiles of a stream of values >= 0, kept as counts on a logarithmic
    scale.

    Percentiles are within 1 % of a value that occurred (nearest rank); all else is exact up to
    rounding.
    """

    def __init__(self) -> None:
        self.count, self.total, self.low, self.high = 0, 0.0, math.inf, 0.0
        self._buckets: Counter[int | None] = Counter()

    def add(self, value: float) -> None:
        """Count one value."""
        self.count += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)
        self._buckets[round(math.log(value, _RATIO)) if value > 0 else None] += 1

    def quantile(self, share: float) -> float:
        """The value that ``share`` of all values do not exceed; 0 when there are none."""
        rank = max(1, math.ceil(share * self.count))
        for bucket in sorted(
            self._buckets, key=lambda index: -math.inf if index is None else index
        ):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return 0.0 if bucket is None else min(self.high, max(self.low, _RATIO**bucket))
        return 0.0

    def summary(self) -> dict[str, float]:
        """Plain JSON: count, mean, min, max and percentiles; only the count when there are no
        values.
        """
        if not self.count:
            return {"count": 0}
        percentiles = {
            f"p{100 * share:.0f}": round(self.quantile(share), 4) for share in _QUANTILES
        }
        return {
            "count": self.count,
            "mean": round(self.total / self.count, 4),
            "min": round(self.low, 4),
            **percentiles,
            "max": round(self.high, 4),
        }


@dataclass(slots=True)
class _Spread:
    """Distributions over problems, solutions or labels. Seconds only of those that were sampled
    whole in this run.
    """

    prompt_tokens: Distribution = field(default_factory=Distribution)
    completion_tokens: Distribution = field(default_factory=Distribution)
    seconds: Distribution = field(default_factory=Distribution)

    def add(self, cost: Cost) -> None:
        self.prompt_tokens.add(cost.prompt_tokens)
        self.completion_tokens.add(cost.completion_tokens)
        if not cost.reused:
            self.seconds.add(cost.seconds)

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: getattr(self, name).summary() for name in _Spread.__slots__}


class Ledger:
    """Sums by part of the stage (``solve``, ``verify``) and spreads over problems, solutions and
    labels.

    ``parts`` is added to as requests end, so that it is right whenever a run stops. Only problems
    that are begun and not finished are remembered one by one.
    """

    def __init__(self, solutions_per_problem: int) -> None:
        self.parts = {"solve": Cost(), "verify": Cost()}
        self.labels = 0
        self.votes_saved = 0
        self.tokens_saved = 0.0
        self._solutions_per_problem = solutions_per_problem
        self._spreads = {"problem": _Spread(), "solution": _Spread(), "label": _Spread()}
        self._open_problems: dict[str, tuple[int, Cost]] = {}

    def solution_done(
        self,
        problem_id: str,
        solve: Cost,
        verify: Cost,
        *,
        labelled: bool = False,
        votes_saved: int = 0,
    ) -> None:
        """One solution will get no more votes in this run. ``votes_saved`` were not asked for,
        being decided.
        """
        total = Cost()
        total.add(solve)
        total.add(verify)
        self._spreads["solution"].add(total)
        if labelled:
            self.labels += 1
            self._spreads["label"].add(total)
        if votes_saved:
            self.votes_saved += votes_saved
            self.tokens_saved += (
                votes_saved * verify.completion_tokens / (verify.sampled + verify.reused)
            )
        done, cost = self._open_problems.pop(problem_id, (0, Cost()))
        cost.add(total)
        if done + 1 < self._solutions_per_problem:
            self._open_problems[problem_id] = (done + 1, cost)
        else:
            self._spreads["problem"].add(cost)

    def summary(self, earlier: dict[str, dict[str, float]] | None = None) -> dict[str, object]:
        """Plain JSON. ``earlier`` is the ``all_runs`` of the same shard's ledger before this run."""
        spent = (
            sum(part.prompt_tokens for part in self.parts.values()),
            sum(part.completion_tokens for part in self.parts.values()),
        )
        return {
            "this_run": {name: _rounded(asdict(part)) for name, part in self.parts.items()},
            "all_runs": self._all_runs(earlier or {}),
            "per_problem": self._spreads["problem"].summary(),
            "per_solution": self._spreads["solution"].summary(),
            "per_label": self._spreads["label"].summary(),
            "labels": self.labels,
            # What was spent on solutions that no label came of is part of the price of a label.
            "prompt_tokens_per_label": round(spent[0] / self.labels, 2) if self.labels else None,
            "completion_tokens_per_label": round(spent[1] / self.labels, 2)
            if self.labels
            else None,
            "early_stop": {
                "votes_saved": self.votes_saved,
                "verify_completion_tokens_saved_estimate": round(self.tokens_saved),
                "estimate": "votes not asked for x mean completion tokens of the votes taken on the same solution",
            },
        }

    def _all_runs(self, earlier: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """What was sampled since the shard began; what a killed run did after its last save is
        missing.
        """
        names = (
            "sampled",
            "sampled_prompt_tokens",
            "sampled_completion_tokens",
            "seconds",
            "failed",
        )
        return {
            part: _rounded(
                {name: earlier.get(part, {}).get(name, 0) + getattr(cost, name) for name in names}
            )
            for part, cost in self.parts.items()
        }


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
    }
