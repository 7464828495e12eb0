"""When each phase of a step ran, and how much of the verification was hidden behind other work.

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
    """Return the same set of moments as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def seconds(intervals: Sequence[Interval]) -> float:
    """Return the total length of the union."""
    return sum(end - start for start, end in union(intervals))


def shared_seconds(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Return the length of the intersection of two unions."""
    return seconds(one) + seconds(other) - seconds([*one, *other])


@dataclass(slots=True)
class Timeline:
    """Intervals by phase and step."""

    # Appended by the prefetch thread and by the trainer's thread: readers copy the list first.
    _spans: list[tuple[str, int, float, float]] = field(default_factory=list)

    @contextmanager
    def during(self, phase: str, step: int) -> Iterator[None]:
        """Record how long the block takes, also when it fails or is cancelled."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((phase, step, start, time.perf_counter()))

    def of(self, phase: str, step: int | None = None) -> list[Interval]:
        """Return the intervals of a phase, of one step or of all remembered steps."""
        return [
            (start, end)
            for each_phase, each_step, start, end in list(self._spans)
            if each_phase == phase and step in (None, each_step)
        ]

    def row(self, step: int) -> dict[str, float]:
        """Return the seconds of each phase in ``step``, and ``verify_hidden``.

        A verification lasts from the end of its response to its verdict. ``verify_hidden`` is the
        share of the time with at least one verification of this step within a
        generation, of whatever step, or within training. The rest is time in which the step waited
        for verifications alone. Without verifications the share is omitted.
        """
        verified = self.of(VERIFY, step)
        row = {
            f"{phase}_seconds": seconds(self.of(phase, step)) for phase in (GENERATE, VERIFY, TRAIN)
        }
        if row["verify_seconds"] > 0:
            others = [*self.of(GENERATE), *self.of(TRAIN)]
            row["verify_hidden"] = shared_seconds(verified, others) / row["verify_seconds"]
        return row

    def forget_before(self, step: int) -> None:
        """Drop the intervals of earlier steps."""
        self._spans = [span for span in self._spans if span[1] >= step]
