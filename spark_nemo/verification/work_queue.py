"""Work queue of stage I: a bounded number of jobs at once, follow-ups before new work."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

Job = Callable[[], Awaitable[None]]
_JOBS_PER_YIELD = 64


class WorkQueue:
    """Queue that runs ``max_in_flight`` jobs at once; a running job may push follow-up jobs.

    New jobs are drawn one at a time from an iterator, as late as possible. Follow-ups come first,
    so that begun work does not pile up. ``new_share`` new jobs are still kept running while fewer
    than ``max_in_flight`` follow-ups wait: otherwise the queue would alternate between new jobs and
    follow-ups, and an engine that serves only one of the two would be idle half of the time. If
    each new job pushes at most ``n`` follow-ups at once, at most ``max_in_flight * (n + 1)`` wait,
    so memory does not grow with the number of jobs.
    """

    def __init__(self, max_in_flight: int, new_share: int) -> None:
        if max_in_flight < 1 or new_share < 1:
            raise ValueError(
                f"WorkQueue max_in_flight={max_in_flight}, new_share={new_share}: at least 1 each"
            )
        self._slots = max_in_flight
        self._new_share = new_share
        self._follow_ups: deque[Job] = deque()
        self._new: Iterator[Job] = iter(())
        self._running = 0
        self._new_running = 0
        self._idle: deque[asyncio.Future[None]] = deque()

    async def run(self, new_jobs: Iterable[Job]) -> None:
        """Run ``new_jobs`` and every follow-up to the end.

        An exception in a job cancels the jobs in flight and is raised in an ``ExceptionGroup``.
        """
        self._new = iter(new_jobs)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._slots):
                group.create_task(self._work())

    def push(self, jobs: Sequence[Job], *, first: bool = False) -> None:
        """Add follow-ups in this order, after the waiting ones or, with ``first``, before them."""
        if first:
            self._follow_ups.extendleft(reversed(jobs))
        else:
            self._follow_ups.extend(jobs)
        self._wake(len(jobs))

    async def _work(self) -> None:
        # One task per slot: a free slot takes its next job in the same step of the event loop.
        done = 0
        while (taken := await self._take()) is not None:
            job, is_new = taken
            self._running += 1
            self._new_running += is_new
            try:
                await job()
            finally:
                self._running -= 1
                self._new_running -= is_new
            done += 1
            if done % _JOBS_PER_YIELD == 0:
                # Jobs whose results are in the store never wait: let other tasks run.
                await asyncio.sleep(0)

    async def _take(self) -> tuple[Job, bool] | None:
        """The next job and whether it is a new one; None at the end."""
        while True:
            mixing = len(self._follow_ups) < self._slots and self._new_running < self._new_share
            if not self._follow_ups or mixing:
                job = next(self._new, None)
                if job is not None:
                    return job, True
            if self._follow_ups:
                return self._follow_ups.popleft(), False
            if not self._running:
                # No running job can push follow-ups: this is the end, also for waiting slots.
                self._wake(self._slots)
                return None
            waiter = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter

    def _wake(self, count: int) -> None:
        while self._idle and count:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1
