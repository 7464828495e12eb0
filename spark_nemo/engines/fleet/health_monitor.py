"""The life of one member: up, watched, taken out, brought back with the current weights."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ..base import EngineFailure, EngineUnavailable
from .pausable_clock import PausableClock
from .replica import Replica, ReplicaState

if TYPE_CHECKING:
    from .fleet import Fleet

log = logging.getLogger(__name__)
_HOUR_S = 3600.0
_WATCH_S = 0.2
"""How often a process that we started is looked at."""
_STALL_TICKS, _ASKED_AGAIN = 6, 2


class ServerSupervisor:
    """Runs as one task per member. ``is_front``: a router, which has no weights of its own."""

    def __init__(
        self,
        fleet: Fleet,
        patience: PausableClock,
        member: Replica,
        weights_lock: asyncio.Lock,
        is_front: bool = False,
    ) -> None:
        self.fleet, self.patience, self.member, self._lock = fleet, patience, member, weights_lock
        self._is_front = is_front

    async def run(self) -> None:
        """Until the member is gone for good."""
        while True:
            if await self._bring_up():
                await self._take_out(await self._watch())
            elif self.member.state is ReplicaState.FAILED:
                await asyncio.Event().wait()  # a task that ends means a bug: see Fleet._ended

    async def _watch(self) -> str:
        """Returns why the member must be taken out."""
        member, probed = self.member, self.patience.now
        while True:
            await self._doze()
            if (death := self._death()) is not None:
                return death
            if member.condemned is not None:
                return member.condemned
            if member.failures >= self.fleet.limits.failures_to_remove:
                return f"{member.failures} requests in a row failed, the last: {member.last_error}"
            due = self.patience.now - probed >= self.fleet.limits.probe_every_s
            if (due or member.suspected) and not self.fleet.paused and not self._lock.locked():
                probed = self.patience.now
                member.suspected = False
                if (error := await self._probe()) is not None:
                    return error

    async def _doze(self) -> None:
        """Until woken, or for the time after which a process is looked at again."""
        member = self.member
        wake = asyncio.ensure_future(member.wake.wait())
        try:
            await asyncio.wait({wake}, timeout=min(_WATCH_S, self.fleet.limits.probe_every_s))
        finally:
            wake.cancel()
        member.wake.clear()

    def _death(self) -> str | None:
        return self.member.keeper.death() if self.member.keeper is not None else None

    async def _probe(self) -> str | None:
        """Why the member is not fit, or None. A failure across which the event loop stood still
        says nothing: the client's own deadline passed before the answer was read. Then it is asked
        again.
        """
        loop, error = asyncio.get_running_loop(), None
        for _ in range(
            _ASKED_AGAIN + 1
        ):  # bounded: on an overloaded machine the clock always lags a little
            wall, counted = loop.time(), self.patience.now
            error = await self._probe_once()
            stalled = (loop.time() - wall) - (
                self.patience.now - counted
            ) > _STALL_TICKS * self.fleet.limits.tick_s
            if error is None or self.fleet.paused or not stalled or self._death() is not None:
                break
        return error

    async def _probe_once(self) -> str | None:
        """A busy member is asked for its state only: a generation would queue behind the others,
        and what answers requests while we wait is alive.
        """
        member, asked = self.member, self.patience.now
        assert member.engine is not None
        busy = member.up and member.load and not self._is_front
        probe = asyncio.ensure_future(
            self._healthy() if busy else member.engine.probe(self.fleet.limits.probe_timeout_s)
        )
        try:
            while not await self.patience.wait(probe, self.fleet.limits.probe_timeout_s):
                if (death := self._death()) is not None:
                    return death
                if member.last_answer <= asked:
                    return f"hangs: no answer to a probe within {self.fleet.limits.probe_timeout_s:.1f} s"
                asked = self.patience.now
            probe.result()
        except EngineFailure as error:
            return self._death() or f"fails a probe: {error}"
        finally:
            probe.cancel()
        return None

    async def _healthy(self) -> None:
        assert self.member.engine is not None
        if not (await self.member.engine.health()).alive:
            raise EngineUnavailable("it reports that it is not alive")

    async def _take_out(self, reason: str) -> None:
        member = self.member
        member.last_error, member.condemned, member.suspected, member.failures = (
            reason,
            None,
            False,
            0,
        )
        member.outages += 1
        member.state = ReplicaState.UNHEALTHY
        member.interrupt()
        log.warning("%s: %s is out: %s", self.fleet.name, member.name, reason)
        self.fleet.count(outages=1)
        self.fleet.changed()
        if (
            member.keeper is not None
        ):  # a hung process would hold the device that its successor needs
            await member.keeper.stop()

    async def _bring_up(self) -> bool:
        """One try. True when it serves; after False the member is out (try again) or gone."""
        member = self.member
        try:
            if member.was_up or member.outages:
                self._set(ReplicaState.UNHEALTHY)
                await asyncio.sleep(self.fleet.limits.backoff(max(1, member.outages)))
            if member.keeper is not None and not await self._restarted():
                return False
            assert member.engine is not None
            if not self.fleet.paused:  # what missed the end of a pause would answer no probe
                await self._match_pause()
            if (error := await self._probe()) is not None:
                raise EngineUnavailable(error)
            return await self._join_current()
        except (EngineFailure, TimeoutError) as error:
            self._failed_start(error)
            return False

    async def _restarted(self) -> bool:
        """Start the server. False when it used up its restarts."""
        member, now = self.member, asyncio.get_running_loop().time()
        assert member.keeper is not None
        if member.was_up:
            member.restarts = [then for then in member.restarts if now - then < _HOUR_S]
            if len(member.restarts) >= member.keeper.max_restarts:
                member.last_error += (
                    f" (after {member.keeper.max_restarts} restarts within an hour)"
                )
                log.error("%s: %s is given up: %s", self.fleet.name, member.name, member.last_error)
                self._set(ReplicaState.FAILED)
                return False
            member.restarts.append(now)
            self.fleet.count(restarts=1)
        self._set(ReplicaState.STARTING)
        old, member.engine = member.engine, None
        if old is not None:
            await self._closed(old)
        member.engine = await member.keeper.start()
        member.version, member.paused = member.folder_version, False
        return True

    async def _closed(self, engine: object) -> None:
        try:
            async with asyncio.timeout(self.fleet.limits.control_timeout_s):
                await engine.close()  # type: ignore[attr-defined]
        except (EngineFailure, TimeoutError) as error:
            log.warning(
                "%s: closing the connection to %s: %s", self.fleet.name, self.member.name, error
            )

    def _failed_start(self, error: Exception) -> None:
        member = self.member
        member.last_error = str(error) or "no answer in time"
        member.outages += 1
        log.warning("%s: %s does not come up: %s", self.fleet.name, member.name, member.last_error)
        # A server of ours that never ran has wrong settings; trying them again takes minutes and
        # changes nothing.
        hopeless = member.keeper is not None and not member.was_up
        self._set(ReplicaState.FAILED if hopeless else ReplicaState.UNHEALTHY)

    async def _join_current(self) -> bool:
        """Serve, with the current weights: those it has, those it is given, or those of the next
        update. False when it died in the meantime.
        """
        member, fleet = self.member, self.fleet
        if member.keeper is None and member.was_up:
            assert member.engine is not None
            if (await member.engine.health()).weight_version != member.version:
                member.version = None  # somebody else restarted it, or gave it weights
        async with self._lock:  # an update that began now would miss a member that is about to join
            if (
                member.version == fleet.version
                or self._is_front
                or await self._brought_up_to_date()
            ):
                await self._join()
                return True
        self._set(ReplicaState.OUTDATED)
        log.warning(
            "%s: %s is alive but has not the weights of version %d: it waits for the next update",
            fleet.name,
            member.name,
            fleet.version,
        )
        while True:
            await self._doze()
            async with self._lock:
                if member.version == fleet.version:
                    await self._join()
                    return True
            if (reason := self._death() or member.condemned) is not None:
                await self._take_out(reason)
                return False

    async def _join(self) -> None:
        member = self.member
        assert member.engine is not None
        await self._match_pause()
        member.condemned, member.suspected, member.failures = None, False, 0
        if member.was_up or member.outages:
            log.info("%s: %s is back", self.fleet.name, member.name)
        member.was_up = True
        self._set(ReplicaState.HEALTHY)
        self.fleet.log_metrics()

    async def _match_pause(self) -> None:
        """Pause or resume it as the fleet is, which may change while we wait for the server."""
        member = self.member
        assert member.engine is not None
        while member.paused != self.fleet.paused and not self._is_front:
            pausing, member.paused = self.fleet.paused, True
            async with asyncio.timeout(self.fleet.limits.control_timeout_s):
                await (member.engine.pause() if pausing else member.engine.resume())
            member.paused = pausing

    async def _brought_up_to_date(self) -> bool:
        member, fleet = self.member, self.fleet
        assert member.engine is not None
        if fleet.on_return is None:
            return False
        self._set(ReplicaState.STARTING)  # it is back: the time in which no server is left is over
        member.version, wanted = None, fleet.version
        try:
            async with asyncio.timeout(fleet.limits.update_timeout_s):
                await fleet.on_return(member.engine, wanted)
        except (EngineFailure, OSError, TimeoutError) as error:
            member.last_error = f"weights version {wanted} for its return: {error or 'not in time'}"
            log.warning("%s: %s: %s", fleet.name, member.name, member.last_error)
            return False
        member.version = wanted
        return True

    def _set(self, state: ReplicaState) -> None:
        if self.member.state is not state:
            self.member.state = state
            self.fleet.changed()
