"""Many requests at once, from asynchronous or ordinary code."""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

from .base import Engine, EngineFailure, Generation, GenerationRequest

log = logging.getLogger(__name__)
Result = TypeVar("Result")
MAX_IN_FLIGHT = 1024


async def generate_all(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    on_result: Callable[[int, Generation | EngineFailure], None] | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> list[Generation | EngineFailure]:
    """Serve all ``requests``; results come back in submission order.

    A request the engine refuses gives its ``EngineFailure`` as the result, so one bad request does
    not cost the others. ``on_result(index, result)`` is called as each finishes, in the event loop:
    it delays the engine while it runs. Any other exception, or cancellation, cancels what is in
    flight and is raised.
    """
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight={max_in_flight}: must be at least 1")
    results: list[Generation | EngineFailure | None] = [None] * len(requests)
    numbered = iter(enumerate(requests))

    async def work() -> None:
        for index, request in numbered:
            try:
                result: Generation | EngineFailure = await engine.generate(request)
            except EngineFailure as failure:
                result = failure
            results[index] = result
            if on_result is not None:
                on_result(index, result)

    workers = [asyncio.create_task(work()) for _ in range(min(max_in_flight, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return results  # type: ignore[return-value]


async def all_or_none(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results, in order. When one fails, the others are cancelled and have ended before its
    error is raised; after ``asyncio.gather`` alone they would go on asking engines.
    """
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def freeze_heap() -> None:
    """Take what is loaded by now out of the garbage collector's walks, once the models are there.

    Many requests in flight make it run often, and each run would walk all of torch's objects again:
    0.07 of 0.26 CPU ms per request (benchmarks/sglang_client.py).
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
    """``run_async`` of one coroutine in a thread of its own, while the caller's thread does
    something else.

    The loop is the process's one: nobody may call ``run_async`` until ``result`` or ``cancel`` has
    returned.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._stop: Callable[[], object] = lambda: None
        self._begun = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run_async")
        self._future = self._thread.submit(run_async, self._cancellable(coroutine))

    async def _cancellable(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._stop = lambda: loop.call_soon_threadsafe(task.cancel)
        self._begun.set()
        return await coroutine

    def result(self) -> Result:
        """Wait for it. Raises what the coroutine raised."""
        try:
            return self._future.result()
        finally:
            self._thread.shutdown()

    def cancel(self) -> None:
        """End the coroutine, wait until it has ended and forget its result. Harmless when it is
        over.
        """
        while not self._future.done() and not self._begun.wait(0.01):
            pass
        if not self._future.done():
            self._stop()
        wait([self._future])
        self._thread.shutdown()


async def until_idle(engine: Engine, timeout_s: float = 10.0) -> None:
    """Return when nothing is in flight at ``engine`` any more, cancelled requests included, or
    after ``timeout_s``.
    """
    end = asyncio.get_running_loop().time() + timeout_s
    while (health := await engine.health()).running or health.waiting:
        if asyncio.get_running_loop().time() > end:
            log.warning(
                "%d requests are still in flight %g s after they were aborted",
                health.running,
                timeout_s,
            )
            return
        await asyncio.sleep(0)
