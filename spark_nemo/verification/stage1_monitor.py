"""Monitoring of a stage I run: progress, speed, tokens spent, and the bound on its failure rate."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from spark_nemo.config import Stage1Config
from spark_nemo.utils.files import write_json_atomic

from .sampler import SamplingCounts
from .token_accounting import TokenAccounting

MIN_SEEN = 200
"""Solutions or verifications needed before their failure rate stops a run.

At the end of the run any number counts.
"""
_SHOW_EVERY_S = 0.1
_SAVE_EVERY_S = 10.0
_SPEED_WINDOW_S = 30.0

FailureCount = tuple[str, int, int]
"""Kind of text, number of failures, number of texts."""


class TooManyFailures(RuntimeError):
    """More solutions or verifications failed than the configuration allows."""


def check_failure_rates(
    counts: SamplingCounts,
    max_failure_rate: float,
    min_seen: int = 1,
    more: Sequence[FailureCount] = (),
) -> None:
    """Raise ``TooManyFailures`` if the share of failures of any kind of text is above the bound.

    Kinds with fewer than ``min_seen`` texts are not checked. ``more`` adds kinds to solutions and
    verifications.
    """
    kinds = [
        ("solutions", counts.unusable_solutions, counts.solutions),
        ("verifications", counts.failed_verifications, counts.verifications),
        *more,
    ]
    for name, failed, total in kinds:
        if total >= min_seen and failed > max_failure_rate * total:
            raise TooManyFailures(
                f"stage1.max_failure_rate={max_failure_rate}: {failed} of {total} {name} are "
                "unusable; look at `text` in the store, or raise the bound"
            )


class TokenAccountingFile:
    """The token accounting of one shard as JSON, with sums over all runs of the shard."""

    def __init__(self, path: Path, accounting: TokenAccounting) -> None:
        self._path = path
        self._accounting = accounting
        self._earlier_runs = json.loads(path.read_text())["all_runs"] if path.exists() else None

    def save(self) -> None:
        """Write the current state."""
        write_json_atomic(self._path, self._accounting.summary(self._earlier_runs))


class Stage1Monitor:
    """Callback for the counts after every result.

    Shows progress, saves the token accounting periodically, and stops a run that mostly fails.
    """

    def __init__(
        self, stage: Stage1Config, total: int, show_progress: Callable[[int, str], None]
    ) -> None:
        """``total`` is the number of verifications; ``show_progress`` takes those done and a note."""
        self.accounting_file: TokenAccountingFile | None = None
        self._stage = stage
        self._show_progress = show_progress
        self._shown_at = time.monotonic()
        self._saved_at = time.monotonic()
        self._speed = SamplingSpeed(total)

    def __call__(self, counts: SamplingCounts) -> None:
        check_failure_rates(counts, self._stage.max_failure_rate, MIN_SEEN)
        now = time.monotonic()
        if now - self._shown_at >= _SHOW_EVERY_S:
            self._shown_at = now
            self.show(counts)
        if now - self._saved_at >= _SAVE_EVERY_S and self.accounting_file is not None:
            self._saved_at = now
            self.accounting_file.save()

    def show(self, counts: SamplingCounts) -> None:
        """Update the progress bar and file."""
        done = votes_done(counts, self._stage)
        note = (
            f"{counts.solutions} solutions, {counts.unusable_solutions} unusable, "
            f"{counts.failed_verifications} failed"
        )
        speed = self._speed.note(done, counts, time.monotonic())
        self._show_progress(done, f"{note}, {speed}" if speed else note)


class _Sample(NamedTuple):
    """State of the counts at one time."""

    time: float
    done: int
    sampled: int
    tokens: int


class SamplingSpeed:
    """Sampling speed over the last half minute; results reused from the store do not count."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._window: deque[_Sample] = deque()

    def note(self, done: int, counts: SamplingCounts, now: float) -> str:
        """``verifications/s, tokens/s, time left``; empty until a second has passed.

        ``now`` is in monotonic seconds.
        """
        current = _Sample(
            time=now,
            done=done,
            sampled=counts.verifications - counts.reused_verifications,
            tokens=counts.solution_tokens + counts.verification_tokens,
        )
        if not self._window or now - self._window[-1].time >= 1:
            self._window.append(current)
        while len(self._window) > 1 and now - self._window[0].time > _SPEED_WINDOW_S:
            self._window.popleft()
        oldest = self._window[0]
        seconds = now - oldest.time
        if seconds < 1:
            return ""
        parts = [
            f"{(current.sampled - oldest.sampled) / seconds:.0f} verifications/s",
            f"{(current.tokens - oldest.tokens) / seconds:,.0f} tokens/s",
        ]
        if done > oldest.done:
            seconds_left = (self._total - done) * seconds / (done - oldest.done)
            parts.append(f"{_clock(seconds_left)} left")
        return ", ".join(parts)


def votes_done(counts: SamplingCounts, stage: Stage1Config) -> int:
    """Verifications that were made or will not be made in this run."""
    of_unusable_solutions = counts.unusable_solutions * stage.verifications_per_solution
    return (
        counts.verifications
        + counts.saved_verifications
        + counts.postponed_verifications
        + of_unusable_solutions
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
