"""One engine of a fleet: its state, its limits, and the launcher of its server if we run it."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

from spark_nemo.config.engine import POOL_DOWN_TIMEOUT_S

from ..base import Engine
from .pausable_clock import PausableClock

TOKEN_TIMEOUT_S = 0.25
"""Default allowance for each token that a request may sample.

A full server samples a token of a large model in less than 0.1 s for each of its requests, and as
many requests again wait for a slot there.
"""
_MAY_BE_ZERO = ("affinity_slack", "token_timeout_s")


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """Bounds of a fleet; times in seconds.

    Request, total, probe and pool-down times do not pass while the fleet is paused or its event
    loop does not run.
    """

    request_timeout_s: float = 600.0
    """Deadline of one attempt; then the replica is probed and the request retried elsewhere."""
    token_timeout_s: float = 0.0
    """Added to the deadline of an attempt for each token that the request may sample."""
    total_timeout_s: float = 3600.0
    """Deadline of all attempts together; grows with the tokens as one attempt does.

    Waiting for a slot of a replica counts towards neither deadline.
    """
    max_attempts: int = 4
    backoff_s: float = 0.5
    """Pause before the second attempt and before a failed replica is tried again; then doubled."""
    max_backoff_s: float = 30.0
    failures_to_evict: int = 3
    """Evict a replica after this many consecutive failed requests, even if it passes probes."""
    probe_every_s: float = 10.0
    probe_timeout_s: float = 30.0
    pool_down_timeout_s: float = POOL_DOWN_TIMEOUT_S
    """Time that requests and updates wait while no replica is healthy and none is starting."""
    control_timeout_s: float = 60.0
    """Pause, resume, health and close of one replica (wall clock)."""
    update_timeout_s: float = 1800.0
    """New weights for one replica (wall clock)."""
    affinity_slack: int = 16
    """A prompt returns to its last replica while that one has at most this many more requests than
    the least loaded replica.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name not in _MAY_BE_ZERO):
                raise ValueError(f"FleetLimits.{field.name}={value}: must be positive")
        if self.total_timeout_s < self.request_timeout_s:
            raise ValueError(
                f"FleetLimits.total_timeout_s={self.total_timeout_s}: must be at least "
                f"request_timeout_s={self.request_timeout_s}"
            )

    @property
    def tick_s(self) -> float:
        """Resolution of the clock that measures these times."""
        shortest = min(
            self.request_timeout_s,
            self.probe_timeout_s,
            self.probe_every_s,
            self.pool_down_timeout_s,
        )
        return min(0.25, 0.2 * shortest)

    def deadlines(self, max_new_tokens: int) -> tuple[float, float]:
        """Return the deadlines of one attempt and of all attempts of a request."""
        attempt_s = self.request_timeout_s + self.token_timeout_s * max_new_tokens
        return attempt_s, self.total_timeout_s * attempt_s / self.request_timeout_s

    def backoff(self, failures: int) -> float:
        """Return the pause after ``failures`` consecutive failures (at least 1)."""
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(failures - 1, 32))


class ReplicaState(StrEnum):
    """State of a replica. ``OUTDATED``: alive with old weights; ``FAILED``: out for good."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    OUTDATED = "outdated"
    FAILED = "failed"


class ServerLauncher(abc.ABC):
    """Starts, restarts and kills the server of a replica."""

    max_restarts: int = 0
    """Restarts within an hour; a server that dies more often has failed."""

    @abc.abstractmethod
    async def start(self) -> Engine:
        """Kill what is left of the last server, start another and wait until it serves.

        Raises ``EngineFailure`` with the reason and the end of the server's log.
        """

    @abc.abstractmethod
    def death(self) -> str | None:
        """Return why the process is dead, or None while it lives (it may still be hung)."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Kill the server and all processes it started; idempotent."""


class RouterHandle(ServerLauncher):
    """Launcher of a router that spreads generation over the replicas."""

    @abc.abstractmethod
    async def route_to(self, engines: Sequence[Engine]) -> None:
        """Send requests to exactly these engines from now on.

        Raises ``EngineFailure`` when the router does not confirm them.
        """


class Replica:
    """Mutable state of one replica; only the fleet's event loop touches it."""

    def __init__(self, name: str, source: Engine | ServerLauncher, version: int) -> None:
        self.name = name
        self.engine: Engine | None = None
        """None until a launched server first runs."""
        self.launcher: ServerLauncher | None = None
        if isinstance(source, ServerLauncher):
            self.launcher = source
        else:
            self.engine = source
        self.folder_version = version
        self.version: int | None = version
        """Version of the served weights; None when an update may have been applied in part."""
        self.state = ReplicaState.STARTING
        self.was_healthy = False
        self.load = 0
        self.last_used = 0
        self.last_answer = 0.0
        self.failures = 0
        """Consecutive failed requests; those that fail within one backoff count once."""
        self.last_failure = -math.inf
        self.outages = 0
        """Consecutive outages without an answer in between."""
        self.last_error = "never started"
        self.suspect = False
        """True if a probe is due now."""
        self.eviction: str | None = None
        """Reason of an eviction that the supervisor has yet to carry out."""
        self.paused = False
        """True if paused, or possibly so: a failed call leaves it True until a resume succeeds."""
        self.restarts: list[float] = []
        self.wake = asyncio.Event()
        self.interrupts: set[asyncio.Future[None]] = set()
        """Completed at eviction, so that no request waits for an answer of this replica."""
        self._slots: tuple[Engine, asyncio.Semaphore] | None = None

    @property
    def serving(self) -> bool:
        """True if requests go to this replica."""
        return self.state is ReplicaState.HEALTHY and self.eviction is None

    @property
    def updatable(self) -> bool:
        """True if the replica is alive, with whatever weights, and is not about to be evicted."""
        alive = self.state in (ReplicaState.HEALTHY, ReplicaState.OUTDATED)
        return alive and self.eviction is None

    @contextlib.asynccontextmanager
    async def slot(self, clock: PausableClock) -> AsyncIterator[bool]:
        """Hold one of the engine's request slots; yields False if the replica was evicted first.

        Waiting has no deadline: a batch of thousands queues for hours on healthy engines, and for
        at most one probe on an engine that dies or hangs.
        """
        engine = self.engine
        if engine is None or engine.max_in_flight is None:
            yield True
            return
        # A restarted server is another engine: slots of its predecessor must not count here.
        if self._slots is None or self._slots[0] is not engine:
            self._slots = (engine, asyncio.Semaphore(engine.max_in_flight))
        semaphore = self._slots[1]
        acquiring = asyncio.ensure_future(semaphore.acquire())
        try:
            yield await clock.wait(acquiring, math.inf, self.interrupts)
        finally:
            # cancel() returns False when the slot was acquired, also just before an interrupt.
            if not acquiring.cancel() and not acquiring.cancelled():
                semaphore.release()

    def interrupt(self) -> None:
        """End every wait for an answer of this replica."""
        for future in self.interrupts:
            if not future.done():
                future.set_result(None)

    def mark_suspect(self, error: Exception | str) -> None:
        """Request a probe now."""
        self.last_error = str(error)
        self.suspect = True
        self.wake.set()

    def evict(self, reason: str) -> None:
        """Request an eviction without a probe; a replica that is out already is only probed."""
        if self.state in (ReplicaState.HEALTHY, ReplicaState.OUTDATED):
            self.eviction = reason
        self.mark_suspect(reason)

    def invalidate_weights(self, reason: str) -> None:
        """Evict the replica until its next update: its weights are in an unknown state."""
        self.version = None
        self.evict(reason)

    def recovery_status(self) -> str:
        """Say why the replica is out and what has to happen before it serves again."""
        if self.state is ReplicaState.FAILED:
            how = "has failed for good"
        elif self.launcher is None:
            how = "rejoins when its owner restarts it"
        else:
            used = f"{len(self.restarts)} of {self.launcher.max_restarts} restarts used"
            how = f"is being restarted ({used})"
        return f"{self.name} {how}; it is out: {self.last_error}"
