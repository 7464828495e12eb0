"""Helpers to call engines from asynchronous and from ordinary code."""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

from .base import Engine, EngineFailure, EngineUnavailable

log = logging.getLogger(__name__)
Result = TypeVar("Result")


async def all_or_none(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Return all results, in order; the first error cancels the rest and is raised.

    The other coroutines have ended by then. After ``asyncio.gather`` alone they would go on sending
    requests to engines.
    """
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def call_each(
    engines: Iterable[Engine],
    call: Callable[[Engine], Coroutine[Any, Any, object]],
    timeout_s: float,
    action: str,
) -> dict[Engine, EngineFailure]:
    """Call all ``engines`` at once and return the failures by engine.

    A call that takes longer than ``timeout_s`` is an ``EngineUnavailable`` that names ``action``.
    Anything but an ``EngineFailure`` is raised.
    """
    failures: dict[Engine, EngineFailure] = {}

    async def call_one(engine: Engine) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await call(engine)
        except EngineFailure as error:
            failures[engine] = error
        except TimeoutError:
            failures[engine] = EngineUnavailable(f"{action} took over {timeout_s:g} s")

    await asyncio.gather(*(call_one(engine) for engine in engines))
    return failures


def freeze_heap() -> None:
    """Exclude the objects that exist by now from garbage collection; call it after loading models.

    Many requests in flight make the collector run often, and each run would walk all of torch's
    objects again: 0.07 of 0.26 CPU ms per request (benchmarks/sglang_client.py).
    """
    gc.collect()
    gc.freeze()


@functools.cache
def _runner() -> asyncio.Runner:
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run ``coroutine`` from ordinary code on the process's one persistent event loop.

    An engine belongs to the loop it was first used on, so every call that touches it must come
    through here. Between calls nothing runs: requests in flight wait. Raises ``RuntimeError``
    inside a running event loop.
    """
    return _runner().run(coroutine)


class BackgroundWork(Generic[Result]):
    """``run_async`` of one coroutine in a thread of its own.

    The event loop is the process's one: call ``run_async`` only after ``result`` or ``cancel`` has
    returned.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._begun = threading.Event()
        self._cancel_task: Callable[[], object] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run_async")
        self._future = self._thread.submit(run_async, self._cancellable(coroutine))

    async def _cancellable(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        # Only the loop's own thread may cancel a task.
        self._cancel_task = functools.partial(loop.call_soon_threadsafe, task.cancel)
        self._begun.set()
        return await coroutine

    def result(self) -> Result:
        """Wait for the result. Raises what the coroutine raised."""
        try:
            return self._future.result()
        finally:
            self._thread.shutdown()

    def cancel(self) -> None:
        """Cancel the coroutine and wait until it has ended; does nothing if it already has."""
        # Polled, because a thread that fails before the coroutine begins never sets the event.
        while not self._future.done() and not self._begun.wait(0.01):
            pass
        if not self._future.done():
            assert self._cancel_task is not None
            self._cancel_task()
        wait([self._future])
        self._thread.shutdown()


async def until_idle(engine: Engine, timeout_s: float = 10.0) -> None:
    """Wait until no request is in flight, cancelled ones included; at most ``timeout_s``."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        health = await engine.health()
        if not health.running and not health.waiting:
            return
        if loop.time() > deadline:
            log.warning(
                "%d requests are still in flight %g s after they were aborted",
                health.running,
                timeout_s,
            )
            return
        await asyncio.sleep(0)
