"""An event loop whose clock jumps to the next timer as soon as nothing is ready.

Sleeps and timeouts cost no real time and end in a fixed order, so that tests of deadlines, probes
and pauses are fast and repeatable. For code that takes its time from the event loop only and
opens no sockets.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector loop with a clock of its own."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    """Advances the loop's clock where a selector would wait."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None):
        if timeout is None:
            raise RuntimeError("deadlock: every task waits and no timer is set")
        self._loop.advance(timeout)
        return super().select(0)


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """``asyncio.run`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)


def block_event_loop(seconds: float) -> None:
    """Let time pass while no task runs, as a synchronous training step does."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.advance(seconds)


def now() -> float:
    """Seconds of virtual time."""
    return asyncio.get_running_loop().time()
