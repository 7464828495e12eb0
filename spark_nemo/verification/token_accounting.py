"""Token accounting of stage I: tokens and seconds per request, problem, solution and label.

Tokens are of prompts and completions, sampled in this run or reused from the store. Seconds are the
time a request of this run was in flight, queueing in the engine included; with many requests in
flight their sum is far above the elapsed time. A *label* is a solution with all its votes (or
decided): the label methods' input. Memory does not grow with the run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field

_RATIO = 1.02
_ZERO = "zero"
"""Bucket of the value 0, which has no logarithm."""
_QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(slots=True)
class Cost:
    """Requests and their tokens and seconds; the tokens of failed requests are unknown."""

    sampled: int = 0
    sampled_prompt_tokens: int = 0
    sampled_completion_tokens: int = 0
    seconds: float = 0.0
    failed: int = 0
    reused: int = 0
    reused_prompt_tokens: int = 0
    reused_completion_tokens: int = 0
    reused_prompts_unknown: int = 0
    """Reused records without a prompt length; their prompt tokens count as 0."""

    def add_sampled(self, prompt_tokens: int, completion_tokens: int, seconds: float) -> None:
        """Add one request that was served in this run."""
        self.sampled += 1
        self.sampled_prompt_tokens += prompt_tokens
        self.sampled_completion_tokens += completion_tokens
        self.seconds += seconds

    def add_failed(self, seconds: float) -> None:
        """Add one request that the engine did not serve."""
        self.failed += 1
        self.seconds += seconds

    def add_reused(self, prompt_tokens: int | None, completion_tokens: int) -> None:
        """Add one result that was in the store."""
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
        """Prompt tokens, sampled and reused."""
        return self.sampled_prompt_tokens + self.reused_prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Completion tokens, sampled and reused."""
        return self.sampled_completion_tokens + self.reused_completion_tokens


class Distribution:
    """Mean, extremes and percentiles of a stream of values >= 0, in constant memory.

    Values are counted on a logarithmic scale: percentiles are within 1 % of a value that occurred
    (nearest rank). Everything else is exact up to rounding.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.low = math.inf
        self.high = 0.0
        self._buckets: Counter[int | str] = Counter()

    def add(self, value: float) -> None:
        """Add one value."""
        self.count += 1
        self.total += value
        self.low = min(self.low, value)
        self.high = max(self.high, value)
        bucket = round(math.log(value, _RATIO)) if value > 0 else _ZERO
        self._buckets[bucket] += 1

    def quantile(self, share: float) -> float:
        """The value that ``share`` of all values do not exceed; 0 without values."""
        rank = max(1, math.ceil(share * self.count))
        rank -= self._buckets[_ZERO]
        if rank <= 0:
            return 0.0
        for bucket in sorted(self._buckets.keys() - {_ZERO}):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return min(self.high, max(self.low, _RATIO**bucket))
        return 0.0

    def summary(self) -> dict[str, float]:
        """Count, mean, min, max and percentiles; only the count without values."""
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
    """Distributions over problems, solutions or labels; seconds only if nothing was reused."""

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


class TokenAccounting:
    """Sums by kind of request (``solve``, ``verify``), and distributions over problems, solutions
    and labels.

    ``costs`` is updated when a request ends, so it is complete whenever a run stops. Only problems
    that are begun and not finished are kept one by one.
    """

    def __init__(self, solutions_per_problem: int) -> None:
        self.costs = {"solve": Cost(), "verify": Cost()}
        self.labels = 0
        self.votes_saved = 0
        self.tokens_saved = 0.0
        self._solutions_per_problem = solutions_per_problem
        self._spreads = {"problem": _Spread(), "solution": _Spread(), "label": _Spread()}
        self._open_problems: dict[str, tuple[int, Cost]] = {}

    def add_solution(
        self,
        problem_id: str,
        solve: Cost,
        verify: Cost,
        *,
        labelled: bool = False,
        votes_saved: int = 0,
    ) -> None:
        """Add a solution that gets no more votes in this run.

        ``votes_saved`` is the number of votes that early stopping did not request.
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
            votes_taken = verify.sampled + verify.reused
            self.tokens_saved += votes_saved * verify.completion_tokens / votes_taken
        done, cost = self._open_problems.pop(problem_id, (0, Cost()))
        cost.add(total)
        if done + 1 < self._solutions_per_problem:
            self._open_problems[problem_id] = (done + 1, cost)
        else:
            self._spreads["problem"].add(cost)

    def summary(self, earlier: dict[str, dict[str, float]] | None = None) -> dict[str, object]:
        """Plain JSON. ``earlier`` is ``all_runs`` of the shard's file before this run."""
        prompt_tokens = sum(cost.prompt_tokens for cost in self.costs.values())
        completion_tokens = sum(cost.completion_tokens for cost in self.costs.values())
        return {
            "this_run": {name: _rounded(asdict(cost)) for name, cost in self.costs.items()},
            "all_runs": self._all_runs(earlier or {}),
            "per_problem": self._spreads["problem"].summary(),
            "per_solution": self._spreads["solution"].summary(),
            "per_label": self._spreads["label"].summary(),
            "labels": self.labels,
            # Tokens of solutions without a label are part of the price of a label.
            "prompt_tokens_per_label": self._per_label(prompt_tokens),
            "completion_tokens_per_label": self._per_label(completion_tokens),
            "early_stop": {
                "votes_saved": self.votes_saved,
                "verify_completion_tokens_saved_estimate": round(self.tokens_saved),
                "estimate": "votes not requested x mean completion tokens of the votes taken on "
                "the same solution",
            },
        }

    def _per_label(self, tokens: int) -> float | None:
        return round(tokens / self.labels, 2) if self.labels else None

    def _all_runs(self, earlier: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Sums over all runs of the shard, but for what a killed run did after its last save."""
        names = (
            "sampled",
            "sampled_prompt_tokens",
            "sampled_completion_tokens",
            "seconds",
            "failed",
        )
        sums = {}
        for kind, cost in self.costs.items():
            before = earlier.get(kind, {})
            sums[kind] = _rounded(
                {name: before.get(name, 0) + getattr(cost, name) for name in names}
            )
        return sums


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
    }
