"""One engine of a fleet: its state, and what starts its server when we are the ones who run it."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from enum import StrEnum

from ..base import Engine
from .pausable_clock import PausableClock


class ReplicaState(StrEnum):
    """``OUTDATED`` lives but serves old weights; ``FAILED`` is given up for good."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    OUTDATED = "outdated"
    FAILED = "failed"


class ServerLauncher(abc.ABC):
    """Runs the server behind a member."""

    max_restarts: int = 0
    """Restarts within an hour; a server that dies more often is given up."""

    @abc.abstractmethod
    async def start(self) -> Engine:
        """Kill what is left of the last server, start another and wait until it serves.

        Raises ``EngineFailure`` that says why it did not come up, with the end of its log.
        """

    @abc.abstractmethod
    def death(self) -> str | None:
        """Why the server is dead, or None while its process lives (which does not prove that it
        answers).
        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """Kill it and all it started; idempotent."""


class RouterHandle(ServerLauncher):
    """The keeper of a router that spreads generation over the members."""

    @abc.abstractmethod
    async def route_to(self, engines: Sequence[Engine]) -> None:
        """Send requests to exactly these from now on. Raises ``EngineFailure`` when the router does
        not obey.
        """


class Replica:
    """Mutable state; only the fleet's event loop touches it. ``engine`` is None until a kept server
    first runs.
    """

    def __init__(
        self, name: str, engine: Engine | None, keeper: ServerLauncher | None, version: int
    ) -> None:
        self.name, self.engine, self.keeper = name, engine, keeper
        self.folder_version = version
        self.version: int | None = version
        """Of the weights it serves; None when an update may have got half way."""
        self.state = ReplicaState.STARTING
        self.was_up = False
        self.load = 0
        self.answered = 0
        self.last_answer = 0.0
        self.failures = 0
        """Requests one after another that it could not serve."""
        self.outages = 0
        """In a row, without an answer in between."""
        self.last_error = "never started"
        self.suspected = False
        self.paused = False
        """It is, or may be: a call that failed leaves it True until a resume succeeds."""
        self.condemned: str | None = None
        self.last_used = 0
        self.restarts: list[float] = []
        self.wake = asyncio.Event()
        self.interrupts: set[asyncio.Future[None]] = set()
        """Set when the member is taken out: whoever waits for an answer stops waiting."""
        self._places: tuple[Engine, asyncio.Semaphore] | None = None

    @classmethod
    def of(cls, name: str, source: Engine | ServerLauncher, version: int) -> Replica:
        """An engine that runs, or a keeper's."""
        return (
            cls(name, None, source, version)
            if isinstance(source, ServerLauncher)
            else cls(name, source, None, version)
        )

    @property
    def up(self) -> bool:
        """Requests go to it."""
        return self.state is ReplicaState.HEALTHY and self.condemned is None

    @property
    def takes_weights(self) -> bool:
        """It lives, with whatever weights, and is not about to be taken out."""
        return (
            self.state in (ReplicaState.HEALTHY, ReplicaState.OUTDATED) and self.condemned is None
        )

    @contextlib.asynccontextmanager
    async def place(self, patience: PausableClock) -> AsyncIterator[bool]:
        """One of the requests that the engine sends at once; False when the member was taken out
        first.

        Whoever waits here has no deadline: a batch of thousands waits for hours on sound engines,
        and on one that dies or hangs no longer than its next probe.
        """
        engine = self.engine
        if engine is None or engine.max_in_flight is None:
            yield True
            return
        if self._places is None or self._places[0] is not engine:
            self._places = (engine, asyncio.Semaphore(engine.max_in_flight))
        places = self._places[1]
        taking = asyncio.ensure_future(places.acquire())
        try:
            yield await patience.wait(taking, math.inf, self.interrupts)
        finally:
            if not taking.cancel() and not taking.cancelled():
                places.release()

    def interrupt(self) -> None:
        """Nobody may wait for its answers any longer."""
        for future in self.interrupts:
            if not future.done():
                future.set_result(None)

    def suspect(self, error: Exception | str) -> None:
        """Have it probed now."""
        self.last_error, self.suspected = str(error), True
        self.wake.set()

    def condemn(self, reason: str) -> None:
        """Have it taken out without a probe. Who is out already comes back as it would have."""
        if self.state in (ReplicaState.HEALTHY, ReplicaState.OUTDATED):
            self.condemned = reason
        self.suspect(reason)
