"""Deadlines on a clock that stands still while the fleet is paused or its event loop is not
running.

A training step of minutes blocks the event loop; on the wall clock every deadline would have passed
when it runs again, before the answers that are waiting in the sockets were read. And a weight
update pauses every request. So one task ticks, each tick counts for at most twice its length, and a
paused tick counts for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class PausableClock:
    """The clock. ``now`` is in seconds since the first tick; ``on_tick(seconds)`` is called after
    each that counts.
    """

    def __init__(
        self, tick_s: float, on_tick: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.now = 0.0
        self.stopped = False
        self._tick_s, self._on_tick = tick_s, on_tick
        self._deadlines: dict[asyncio.Future[None], float] = {}

    async def run(self) -> None:
        """Tick until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(self._tick_s)
            passed = 0.0 if self.stopped else min(loop.time() - before, 2 * self._tick_s)
            self.now += passed
            for future in [f for f, deadline in self._deadlines.items() if deadline <= self.now]:
                del self._deadlines[future]
                if not future.done():
                    future.set_result(None)
            self._on_tick(passed)

    async def wait(
        self,
        task: asyncio.Future,
        seconds: float,
        interrupts: set[asyncio.Future[None]] | None = None,
    ) -> bool:
        """Until ``task`` is done (True), so much of this clock has passed, or somebody sets the
        future that waits in ``interrupts`` (False). Does not cancel ``task``.
        """
        alarm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deadlines[alarm] = self.now + seconds
        if interrupts is not None:
            interrupts.add(alarm)
        try:
            await asyncio.wait({task, alarm}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._deadlines.pop(alarm, None)
            if interrupts is not None:
                interrupts.discard(alarm)
            alarm.cancel()
        return task.done()
