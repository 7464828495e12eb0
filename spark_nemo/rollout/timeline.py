"""When each part of a step ran, and how much of the verification was hidden behind other work.

Everything here depends on the clock, so it goes to ``TIMING`` and never to the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

TIMING = "timing.jsonl"
GENERATE, VERIFY, TRAIN = "generate", "verify", "train"
Interval = tuple[float, float]


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same set of moments as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def seconds(intervals: Sequence[Interval]) -> float:
    """Total length of the union."""
    return sum(end - start for start, end in union(intervals))


def shared_seconds(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Length of the intersection of two unions."""
    return seconds(one) + seconds(other) - seconds([*one, *other])


@dataclass(slots=True)
class Timeline:
    """Intervals by kind and step. Several threads may add to it."""

    _spans: list[tuple[str, int, float, float]] = field(default_factory=list)

    @contextmanager
    def during(self, kind: str, step: int) -> Iterator[None]:
        """Note how long the block takes, also when it fails or is cancelled."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((kind, step, start, time.perf_counter()))

    def of(self, kind: str, step: int | None = None) -> list[Interval]:
        """The intervals of a kind, of one step or of all that are remembered."""
        return [(a, b) for k, s, a, b in list(self._spans) if k == kind and step in (None, s)]

    def row(self, step: int) -> dict[str, float]:
        """Seconds of each kind in ``step`` and ``verify_hidden``; without verifications there is no
        such share.

        ``verify_hidden`` is the share of the time in which at least one verification of the step's
        rollouts was on its way (from the end of its response to its judgement) that lies within a
        generation, of whatever step, or within training. What is not hidden is time in which the
        step waited for verifications alone.
        """
        verified = self.of(VERIFY, step)
        row = {
            f"{kind}_seconds": seconds(self.of(kind, step)) for kind in (GENERATE, VERIFY, TRAIN)
        }
        if row["verify_seconds"] > 0:
            others = [*self.of(GENERATE), *self.of(TRAIN)]
            row["verify_hidden"] = shared_seconds(verified, others) / row["verify_seconds"]
        return row

    def forget_before(self, step: int) -> None:
        """Drop the intervals of earlier steps."""
        self._spans = [span for span in self._spans if span[1] >= step]
