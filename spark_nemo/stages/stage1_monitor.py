"""Watching stage I at work: how fast it is, what it spends, and whether too much of it fails."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from spark_nemo.config import Stage1Config
from spark_nemo.run.run_folder import Progress
from spark_nemo.utils.files import write_json_atomic
from spark_nemo.verification.sampler import CollectCounts
from spark_nemo.verification.token_accounting import Ledger

MIN_SEEN = 200
"""Solutions or verifications before their failure rate stops a run; at its end any number counts.
"""
_SHOW_S, _SAVE_S, _WINDOW_S = 0.1, 10.0, 30.0


class TooManyFailures(RuntimeError):
    """More solutions or verifications failed than the configuration allows."""


def check_failure_rates(
    counts: CollectCounts,
    bound: float,
    min_seen: int = 1,
    more: Sequence[tuple[str, int, int]] = (),
) -> None:
    """Raise ``TooManyFailures`` when a share of at least ``min_seen`` solutions or verifications is
    above ``bound``.

    ``more`` has ``(what, failed, all)`` of other kinds of text.
    """
    for name, failed, total in (
        ("solutions", counts.unusable_solutions, counts.solutions),
        ("verifications", counts.failed_verifications, counts.verifications),
        *more,
    ):
        if total >= min_seen and failed > bound * total:
            raise TooManyFailures(
                f"stage I: {failed} of {total} {name} are unusable, above "
                f"stage1.max_failure_rate={bound}: look at `text` in the store, or raise the bound"
            )


class LedgerFile:
    """A shard's ledger as JSON, rewritten as a whole; sums over all its runs go on from what the
    file said before.
    """

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path, self._ledger = path, ledger
        self._earlier = json.loads(path.read_text())["all_runs"] if path.exists() else None

    def save(self) -> None:
        """Write the state of now."""
        write_json_atomic(self._path, self._ledger.summary(self._earlier))


class Stage1Watch:
    """Called with the counts after every result; shows and saves now and then, and stops a run that
    mostly fails.
    """

    def __init__(self, stage: Stage1Config, bar: Progress, total: int) -> None:
        self.ledger: LedgerFile | None = None
        self._stage, self._bar, self._total = stage, bar, total
        self._shown = self._saved = time.monotonic()
        self._rates = Rates(total)

    def __call__(self, counts: CollectCounts) -> None:
        check_failure_rates(counts, self._stage.max_failure_rate, MIN_SEEN)
        now = time.monotonic()
        if now - self._shown >= _SHOW_S:
            self._shown = now
            self.show(counts)
        if now - self._saved >= _SAVE_S and self.ledger is not None:
            self._saved = now
            self.ledger.save()

    def show(self, counts: CollectCounts) -> None:
        """Bring bar and progress file up to date."""
        done = votes_done(counts, self._stage)
        note = (
            f"{counts.solutions} solutions, {counts.unusable_solutions} unusable, "
            f"{counts.failed_verifications} failed"
        )
        speed = self._rates.note(done, counts, time.monotonic())
        self._bar.update(done, f"{note}, {speed}" if speed else note)


class Rates:
    """Speed over the last half minute: what a resumed run found in the store does not count as
    sampled.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen: deque[tuple[float, int, int, int]] = deque()

    def note(self, done: int, counts: CollectCounts, now: float) -> str:
        """``verifications/s, tokens/s, time left``, empty until a second has passed. ``now`` in
        monotonic seconds.
        """
        tokens = counts.solution_tokens + counts.verification_tokens
        if not self._seen or now - self._seen[-1][0] >= 1:
            self._seen.append(
                (now, done, counts.verifications - counts.reused_verifications, tokens)
            )
        while len(self._seen) > 1 and now - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        then, done_then, sampled_then, tokens_then = self._seen[0]
        if (seconds := now - then) < 1:
            return ""
        sampled = counts.verifications - counts.reused_verifications - sampled_then
        parts = [
            f"{sampled / seconds:.0f} verifications/s",
            f"{(tokens - tokens_then) / seconds:,.0f} tokens/s",
        ]
        if done > done_then:
            parts.append(f"{_clock((self._total - done) * seconds / (done - done_then))} left")
        return ", ".join(parts)


def votes_done(counts: CollectCounts, stage: Stage1Config) -> int:
    """Verifications that were made or will not be: of problems x M x N."""
    never = counts.unusable_solutions * stage.verifications_per_solution
    return (
        counts.verifications + counts.saved_verifications + counts.postponed_verifications + never
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
