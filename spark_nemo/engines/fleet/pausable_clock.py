"""A clock that stops while the fleet is paused or its event loop does not run.

A training step of minutes blocks the event loop. On the wall clock every deadline would have passed
when the loop runs again, before the answers that wait in the sockets are read. A weight update
pauses every request as well. So one task ticks, a tick counts for at most twice its length, and a
tick during a pause counts for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class PausableClock:
    """Seconds of running time. ``on_tick(seconds)`` is called after every tick."""

    def __init__(self, tick_s: float, on_tick: Callable[[float], None] | None = None) -> None:
        self.now = 0.0
        self.stopped = False
        self._tick_s = tick_s
        self._on_tick = on_tick
        self._deadlines: dict[asyncio.Future[None], float] = {}

    async def run(self) -> None:
        """Tick until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(self._tick_s)
            passed = 0.0
            if not self.stopped:
                # The cap is what makes a blocked event loop count as no more than two ticks.
                passed = min(loop.time() - before, 2 * self._tick_s)
            self.now += passed
            self._fire_deadlines()
            if self._on_tick is not None:
                self._on_tick(passed)

    def _fire_deadlines(self) -> None:
        due = [alarm for alarm, deadline in self._deadlines.items() if deadline <= self.now]
        for alarm in due:
            del self._deadlines[alarm]
            if not alarm.done():
                alarm.set_result(None)

    async def wait(
        self,
        task: asyncio.Future,
        seconds: float,
        interrupts: set[asyncio.Future[None]] | None = None,
    ) -> bool:
        """Wait until ``task`` is done, ``seconds`` have passed or the wait is interrupted.

        Returns True if ``task`` is done. Does not cancel it. While waiting, ``interrupts`` holds a
        future whose completion ends the wait.
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
