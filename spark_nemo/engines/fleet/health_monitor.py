"""The life of one replica: up, watched, evicted, and brought back with the current weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from ..base import Engine, EngineFailure, EngineUnavailable
from .pausable_clock import PausableClock
from .replica import FleetLimits, Replica, ReplicaState

log = logging.getLogger(__name__)
OnReturn = Callable[[Engine, int], Awaitable[None]]
_HOUR_S = 3600.0
_WATCH_S = 0.2
"""Interval at which a launched process is checked."""
_STALL_TICKS = 6
_PROBE_ATTEMPTS = 3


class SupervisedFleet(Protocol):
    """The part of a fleet that a supervisor reads and reports to."""

    name: str
    limits: FleetLimits
    version: int
    on_return: OnReturn | None

    @property
    def paused(self) -> bool:
        """True between the fleet's ``pause`` and ``resume``."""

    def notify_changed(self) -> None:
        """Report that the replica's state changed."""

    def count(self, *, outages: int = 0, restarts: int = 0) -> None:
        """Report an outage or a restart."""

    def log_metrics(self) -> None:
        """Log the fleet's metrics."""


class ServerSupervisor:
    """Supervise one replica in a task of its own. A router (``is_router``) has no weights."""

    def __init__(
        self,
        fleet: SupervisedFleet,
        clock: PausableClock,
        replica: Replica,
        weights_lock: asyncio.Lock,
        is_router: bool = False,
    ) -> None:
        self._fleet = fleet
        self._limits = fleet.limits
        self._clock = clock
        self._replica = replica
        self._weights_lock = weights_lock
        self._is_router = is_router

    async def run(self) -> None:
        """Bring the replica up, watch it, evict it, and start over; never returns."""
        while True:
            if await self._bring_up():
                await self._evict(await self._watch())
            elif self._replica.state is ReplicaState.FAILED:
                await asyncio.Event().wait()  # the fleet treats a task that ends as a bug

    async def _watch(self) -> str:
        """Watch a healthy replica; returns why it must be evicted."""
        replica = self._replica
        probed_at = self._clock.now
        while True:
            await self._wait_event()
            death = self._death()
            if death is not None:
                return death
            if replica.eviction is not None:
                return replica.eviction
            if replica.failures >= self._limits.failures_to_evict:
                return f"{replica.failures} requests failed in a row: {replica.last_error}"
            due = replica.suspect or self._clock.now - probed_at >= self._limits.probe_every_s
            # A paused server answers no probe, nor does one that is loading weights.
            if due and not self._fleet.paused and not self._weights_lock.locked():
                probed_at = self._clock.now
                replica.suspect = False
                error = await self._probe()
                if error is not None:
                    return error

    async def _wait_event(self) -> None:
        """Wait until the replica needs attention, at most until its process is checked again."""
        wake = asyncio.ensure_future(self._replica.wake.wait())
        try:
            await asyncio.wait({wake}, timeout=min(_WATCH_S, self._limits.probe_every_s))
        finally:
            wake.cancel()
        self._replica.wake.clear()

    def _death(self) -> str | None:
        launcher = self._replica.launcher
        return None if launcher is None else launcher.death()

    async def _probe(self) -> str | None:
        """Return why the replica fails its probe, or None.

        A failed probe is repeated when the event loop was blocked meanwhile: a deadline then passed
        before the answer was read. A probe that a launched server rejects at once is repeated after
        a pause: a moment of 503 must not cost a restart, which takes minutes.
        """
        loop = asyncio.get_running_loop()
        error = None
        rejections = 0
        # Bounded, because on an overloaded machine the clock always lags a little.
        for _ in range(_PROBE_ATTEMPTS):
            wall_before = loop.time()
            clock_before = self._clock.now
            error = await self._probe_once()
            if error is None or self._fleet.paused or self._death() is not None:
                break
            passed_s = self._clock.now - clock_before
            stalled = loop.time() - wall_before - passed_s > _STALL_TICKS * self._limits.tick_s
            rejected = passed_s < self._limits.probe_timeout_s / 2
            if stalled:
                continue
            if self._replica.launcher is None or not rejected or rejections:
                break
            rejections += 1
            await asyncio.sleep(self._limits.backoff_s)
            if self._replica.paused:
                # Paused meanwhile: it answers no probe now, so it is probed after the pause.
                self._replica.suspect = True
                return None
        return error

    async def _probe_once(self) -> str | None:
        replica = self._replica
        timeout_s = self._limits.probe_timeout_s
        assert replica.engine is not None
        # A busy replica is asked for its health only: a generated token would queue behind the
        # requests of a full server.
        if replica.serving and replica.load and not self._is_router:
            probe = asyncio.ensure_future(self._check_health(replica.engine))
        else:
            probe = asyncio.ensure_future(replica.engine.probe(timeout_s))
        started = self._clock.now
        try:
            while not await self._clock.wait(probe, timeout_s):
                death = self._death()
                if death is not None:
                    return death
                # A replica that answered a request meanwhile does not hang.
                if replica.last_answer <= started:
                    return f"hangs: no answer to a probe within {timeout_s:.1f} s"
                started = self._clock.now
            probe.result()
        except EngineFailure as error:
            return self._death() or f"fails a probe: {error}"
        finally:
            probe.cancel()
        return None

    @staticmethod
    async def _check_health(engine: Engine) -> None:
        health = await engine.health()
        if not health.alive:
            raise EngineUnavailable("the engine reports that it is not alive")

    async def _evict(self, reason: str) -> None:
        """Take the replica out: interrupt its requests and kill its server if we launched it."""
        replica = self._replica
        replica.last_error = reason
        replica.eviction = None
        replica.suspect = False
        replica.failures = 0
        replica.outages += 1
        replica.state = ReplicaState.UNHEALTHY
        replica.interrupt()
        log.warning("%s: %s is out: %s", self._fleet.name, replica.name, reason)
        self._fleet.count(outages=1)
        self._fleet.notify_changed()
        if replica.launcher is not None:
            # A hung process would hold the device that its successor needs.
            await replica.launcher.stop()

    async def _bring_up(self) -> bool:
        """Try once to bring the replica up; returns True when it serves.

        After False the replica is UNHEALTHY (try again) or FAILED.
        """
        replica = self._replica
        try:
            if replica.was_healthy or replica.outages:
                self._set_state(ReplicaState.UNHEALTHY)
                await asyncio.sleep(self._limits.backoff(max(1, replica.outages)))
            if replica.launcher is not None and not await self._restart():
                return False
            assert replica.engine is not None
            if not self._fleet.paused:
                # A server that missed the end of a pause would answer no probe.
                await self._match_pause()
            error = await self._probe()
            if error is not None:
                raise EngineUnavailable(error)
            return await self._sync_and_admit()
        except (EngineFailure, TimeoutError) as error:
            self._start_failed(error)
            return False

    async def _restart(self) -> bool:
        """Start the server; returns False when its restarts are used up."""
        replica = self._replica
        launcher = replica.launcher
        assert launcher is not None
        if replica.was_healthy:
            now = asyncio.get_running_loop().time()
            replica.restarts = [then for then in replica.restarts if now - then < _HOUR_S]
            if len(replica.restarts) >= launcher.max_restarts:
                replica.last_error += f" (after {launcher.max_restarts} restarts within an hour)"
                log.error(
                    "%s: %s has failed for good: %s",
                    self._fleet.name,
                    replica.name,
                    replica.last_error,
                )
                self._set_state(ReplicaState.FAILED)
                return False
            replica.restarts.append(now)
            self._fleet.count(restarts=1)
        self._set_state(ReplicaState.STARTING)
        old = replica.engine
        replica.engine = None
        if old is not None:
            await self._close(old)
        replica.engine = await launcher.start()
        replica.version = replica.folder_version
        replica.paused = False
        return True

    async def _close(self, engine: Engine) -> None:
        try:
            async with asyncio.timeout(self._limits.control_timeout_s):
                await engine.close()
        except (EngineFailure, TimeoutError) as error:
            log.warning(
                "%s: closing the connection to %s: %s", self._fleet.name, self._replica.name, error
            )

    def _start_failed(self, error: Exception) -> None:
        replica = self._replica
        replica.last_error = str(error) or "no answer in time"
        replica.outages += 1
        log.warning(
            "%s: %s does not come up: %s", self._fleet.name, replica.name, replica.last_error
        )
        if replica.launcher is not None and not replica.was_healthy:
            # A launched server that never ran has wrong settings: a retry takes minutes and
            # changes nothing.
            self._set_state(ReplicaState.FAILED)
        else:
            self._set_state(ReplicaState.UNHEALTHY)

    async def _sync_and_admit(self) -> bool:
        """Admit the replica once it serves the current weights; returns False if it dies first.

        The weights are those it has, those ``on_return`` gives it, or those of the next update.
        """
        replica = self._replica
        fleet = self._fleet
        if replica.launcher is None and replica.was_healthy:
            assert replica.engine is not None
            if (await replica.engine.health()).weight_version != replica.version:
                replica.version = None  # its owner restarted it or changed its weights
        # Under the lock, because an update that began now would miss a replica about to join.
        async with self._weights_lock:
            if self._is_current() or await self._update_weights():
                await self._admit()
                return True
        self._set_state(ReplicaState.OUTDATED)
        log.warning(
            "%s: %s is alive without weights version %d: it waits for the next update",
            fleet.name,
            replica.name,
            fleet.version,
        )
        while True:
            await self._wait_event()
            async with self._weights_lock:
                if self._is_current():
                    await self._admit()
                    return True
            reason = self._death() or replica.eviction
            if reason is not None:
                await self._evict(reason)
                return False

    def _is_current(self) -> bool:
        return self._is_router or self._replica.version == self._fleet.version

    async def _update_weights(self) -> bool:
        """Bring the replica to the fleet's weights by ``on_return``; returns False if it fails."""
        replica = self._replica
        fleet = self._fleet
        assert replica.engine is not None
        if fleet.on_return is None:
            return False
        # STARTING also stops the pool-down timer: a server that loads weights has returned.
        self._set_state(ReplicaState.STARTING)
        replica.version = None
        version = fleet.version
        try:
            async with asyncio.timeout(self._limits.update_timeout_s):
                await fleet.on_return(replica.engine, version)
        except (EngineFailure, OSError, TimeoutError) as error:
            reason = str(error) or "not in time"
            replica.last_error = f"weights version {version} on its return: {reason}"
            log.warning("%s: %s: %s", fleet.name, replica.name, replica.last_error)
            return False
        replica.version = version
        return True

    async def _admit(self) -> None:
        replica = self._replica
        await self._match_pause()
        replica.eviction = None
        replica.suspect = False
        replica.failures = 0
        if replica.was_healthy or replica.outages:
            log.info("%s: %s is back", self._fleet.name, replica.name)
        replica.was_healthy = True
        self._set_state(ReplicaState.HEALTHY)
        self._fleet.log_metrics()

    async def _match_pause(self) -> None:
        """Pause or resume the replica as the fleet is."""
        replica = self._replica
        assert replica.engine is not None
        # A loop, because the fleet may be paused or resumed while the server's reply is awaited.
        while replica.paused != self._fleet.paused and not self._is_router:
            pausing = self._fleet.paused
            replica.paused = True  # possibly, until the call has succeeded
            async with asyncio.timeout(self._limits.control_timeout_s):
                await (replica.engine.pause() if pausing else replica.engine.resume())
            replica.paused = pausing

    def _set_state(self, state: ReplicaState) -> None:
        if self._replica.state is not state:
            self._replica.state = state
            self._fleet.notify_changed()
