"""One call to many engines at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from ..base import Engine, EngineFailure, EngineUnavailable


async def call_each(
    engines: Sequence[Engine],
    call: Callable[[Engine], Coroutine[None, None, object]],
    seconds: float,
) -> dict[Engine, EngineFailure]:
    """The failures by engine. Anything but an ``EngineFailure`` is raised."""

    async def one(engine: Engine) -> EngineFailure | None:
        try:
            async with asyncio.timeout(seconds):
                await call(engine)
        except EngineFailure as error:
            return error
        except TimeoutError:
            return EngineUnavailable(f"no answer within {seconds:.1f} s")
        return None

    answers = await asyncio.gather(*(one(engine) for engine in engines))
    return {engine: error for engine, error in zip(engines, answers) if error is not None}
