"""Fake engines that die, hang, reject and return, for tests of a fleet."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable

from spark_nemo.engines import (
    Engine,
    EngineFailure,
    EngineHealth,
    EngineUnavailable,
    FinishReason,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from spark_nemo.engines.fleet import Fleet, FleetLimits, ServerLauncher

QUICK = FleetLimits(
    request_timeout_s=0.3,
    total_timeout_s=5.0,
    max_attempts=6,
    backoff_s=0.002,
    max_backoff_s=0.02,
    probe_every_s=0.05,
    probe_timeout_s=0.1,
    pool_down_timeout_s=0.4,
    control_timeout_s=0.2,
    update_timeout_s=0.5,
)


def ask(*prompt: int) -> GenerationRequest:
    return GenerationRequest(prompt or (1, 2, 3), SamplingParams(max_new_tokens=4))


class FakeEngine(Engine):
    """Answers with the prompt and its own number after ``delay``. ``dead``, ``hung``: what a crash
    and a SIGSTOP look like to a client.
    """

    def __init__(
        self, number: int = 0, delay: float = 0.001, max_in_flight: int | None = None
    ) -> None:
        self.number = number
        self.delay = delay
        self.max_in_flight = max_in_flight
        self.dead = False
        self.hung = False
        self.closed = False
        self.paused = False
        self.rejects_weights = False
        self.version = 0
        self.running = 0
        self.probed = False
        self.seen: list[tuple[int, ...]] = []

    async def _alive(self) -> None:
        while self.hung:
            await asyncio.sleep(0.005)
        if self.dead:
            raise EngineUnavailable(f"engine {self.number}: connection refused")

    async def generate(self, request: GenerationRequest) -> Generation:
        if request.prompt_ids[0] < 0:
            raise EngineFailure(f"token id {request.prompt_ids[0]} is outside the vocabulary")
        self.seen.append(request.prompt_ids)
        self.running += 1
        try:
            await self._alive()
            await asyncio.sleep(self.delay)
            while self.paused:
                await asyncio.sleep(0.002)
            await self._alive()
        finally:
            self.running -= 1
        ids = (*request.prompt_ids, self.number)
        return Generation(ids, (0.0,) * len(ids), (self.version,) * len(ids), FinishReason.STOP)

    async def update_weights(self, tensors, version: int) -> None:
        list(tensors)
        await self._alive()
        if self.rejects_weights:
            raise EngineFailure(f"engine {self.number}: tensor of another shape")
        self.version = version

    async def pause(self) -> None:
        await self._alive()
        self.paused = True

    async def resume(self) -> None:
        await self._alive()
        self.paused = False

    async def health(self) -> EngineHealth:
        self.probed = True
        await self._alive()
        return EngineHealth(not self.dead, self.paused, self.running, 0, self.version, 0)

    async def close(self) -> None:
        self.closed = True


class FakeLauncher(ServerLauncher):
    """A process whose every start is a new ``FakeEngine`` with the folder's weights, version 0."""

    def __init__(
        self,
        number: int = 0,
        max_restarts: int = 3,
        start_s: float = 0.01,
        delay: float = 0.001,
        engine_of: Callable[[], FakeEngine] | None = None,
    ) -> None:
        self.number = number
        self.max_restarts = max_restarts
        self.start_s = start_s
        self.engine_of = engine_of or (lambda: FakeEngine(number, delay))
        self.engines: list[FakeEngine] = []
        self.stopped = 0
        self.fails_with = ""

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    async def start(self) -> FakeEngine:
        await asyncio.sleep(self.start_s)
        if self.fails_with:
            raise EngineFailure(self.fails_with)
        self.engines.append(self.engine_of())
        return self.engine

    def death(self) -> str | None:
        return "exit status -9" if self.engines and self.engine.dead else None

    async def stop(self) -> None:
        self.stopped += 1
        if self.engines:
            self.engine.dead, self.engine.hung = True, False


@contextlib.asynccontextmanager
async def running(replicas, limits: FleetLimits = QUICK, **settings) -> AsyncIterator[Fleet]:
    """A fleet that is closed at the end."""
    named = (
        replicas
        if isinstance(replicas, dict)
        else {f"m{i}": replica for i, replica in enumerate(replicas)}
    )
    fleet = Fleet(named, limits, **settings)
    try:
        yield fleet
    finally:
        await fleet.close()


async def until(condition, seconds: float = 3.0) -> None:
    """Wait for a condition of a background task."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


async def trouble(engines: list[FakeEngine], draw: random.Random, stop: asyncio.Event) -> None:
    """Kill, hang and revive at random; engine 0 never fails for long, so that there is always a way
    out.
    """
    while not stop.is_set():
        engine = draw.choice(engines)
        engine.dead, engine.hung = draw.choice(
            [(True, False), (False, True), (False, False), (False, False)]
        )
        await asyncio.sleep(draw.uniform(0.001, 0.02))
        if engine.number == 0:
            engine.dead = engine.hung = False
