"""A bounded number of jobs at once, follow-ups before new work: how stage I keeps engines busy and
memory flat.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

Job = Callable[[], Awaitable[None]]
_JOBS_PER_YIELD = 64


class WorkQueue:
    """Runs ``max_in_flight`` jobs at once; a job may push follow-up jobs while it runs.

    New jobs are drawn one at a time from an iterator, as late as possible. Follow-ups come first,
    or what is begun would pile up unfinished; but ``new_share`` new jobs are kept going as long as
    fewer than ``max_in_flight`` follow-ups wait, or the queue would swing between nothing but new
    jobs and nothing but follow-ups, and an engine that serves only one of the two would stand idle
    half of the time. When each new job pushes at most ``n`` follow-ups at once, at most
    ``max_in_flight * (n + 1)`` wait: memory does not grow with the number of jobs.

    A slot that falls free is taken again in the same step of the event loop, without a new task.
    """

    def __init__(self, max_in_flight: int, new_share: int) -> None:
        if max_in_flight < 1 or new_share < 1:
            raise ValueError(
                f"WorkQueue max_in_flight={max_in_flight}, new_share={new_share}: at least 1 each"
            )
        self._slots, self._new_share = max_in_flight, new_share
        self._follow_ups: deque[Job] = deque()
        self._new: Iterator[Job] = iter(())
        self._running = self._new_running = 0
        self._idle: deque[asyncio.Future[None]] = deque()

    async def run(self, new_jobs: Iterable[Job]) -> None:
        """Work until ``new_jobs`` and every follow-up are done.

        An exception in a job cancels the jobs in flight and is raised in an ``ExceptionGroup``.
        """
        self._new = iter(new_jobs)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._slots):
                group.create_task(self._work())

    def push(self, jobs: Sequence[Job], *, first: bool = False) -> None:
        """Add follow-ups in this order, behind those that wait or, with ``first``, before them."""
        if first:
            self._follow_ups.extendleft(reversed(jobs))
        else:
            self._follow_ups.extend(jobs)
        self._wake(len(jobs))

    async def _work(self) -> None:
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
                await asyncio.sleep(
                    0
                )  # jobs whose results are stored already never wait, and others want to run

    async def _take(self) -> tuple[Job, bool] | None:
        """The next job and whether it is a new one; None when there will be no more."""
        while True:
            mixing = len(self._follow_ups) < self._slots and self._new_running < self._new_share
            if (not self._follow_ups or mixing) and (job := next(self._new, None)) is not None:
                return job, True
            if self._follow_ups:
                return self._follow_ups.popleft(), False
            if not self._running:
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
