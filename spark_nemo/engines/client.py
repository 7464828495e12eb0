"""Many requests at once, from asynchronous or ordinary code."""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from .base import Engine, EngineFailure, Generation, GenerationRequest

Result = TypeVar("Result")
MAX_IN_FLIGHT = 1024


async def generate_all(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    on_result: Callable[[int, Generation | EngineFailure], None] | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> list[Generation | EngineFailure]:
    """Serve all ``requests``; results come back in submission order.

    A request the engine refuses gives its ``EngineFailure`` as the result, so one bad request does not cost the others.
    ``on_result(index, result)`` is called as each finishes, in the event loop: it delays the engine while it runs.
    Any other exception, or cancellation, cancels what is in flight and is raised.
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


def freeze_heap() -> None:
    """Take what is loaded by now out of the garbage collector's walks, once the models are there.

    Many requests in flight make it run often, and each run would walk all of torch's objects again: 0.07 of 0.26 CPU ms
    per request (benchmarks/sglang_client.py).
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

    An engine belongs to the loop it was first used on, so every call that touches it must come through here. Between
    calls nothing runs: requests in flight wait. Raises ``RuntimeError`` inside a running event loop.
    """
    return _runner().run(coroutine)
