"""Many engines as one that survives the death of any of them.

A request goes to one member at a time and is answered once: when its member dies, hangs or cannot
serve it, the attempt is abandoned (a late answer is dropped) and the request is redone elsewhere.
Members are watched one task each (``health_monitor.py``). With a front (a router), first attempts go
through it and later ones directly to a member.

One event loop owns a fleet; its tasks start with the first call that is awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace

import torch

from ..base import (
    Engine,
    EngineFailure,
    EngineHealth,
    EngineLost,
    EngineUnavailable,
    FinishReason,
    Generation,
    GenerationRequest,
)
from .calls import call_each
from .health_monitor import ServerSupervisor
from .limits import FleetLimits
from .metrics import FleetMetrics
from .pausable_clock import PausableClock
from .replica import Replica, ReplicaState, RouterHandle, ServerLauncher
from .routing import PrefixRouting
from .weights import WeightUpdate, outlook, settle, spoil

log = logging.getLogger(__name__)
OnReturn = Callable[[Engine, int], Awaitable[None]]
_LOG_EVERY_S = 30.0


class Fleet(Engine):
    """``members`` by name: engines that run already, or keepers that start (and restart) them.

    ``version`` is that of the weights every member has from its own folder. ``on_return(engine,
    version)`` must bring a returning engine to ``version`` and raise ``EngineFailure`` when it
    cannot; without it, or when it fails, a member that missed an update waits for the next one.
    """

    def __init__(
        self,
        members: dict[str, Engine | ServerLauncher],
        limits: FleetLimits | None = None,
        *,
        name: str = "fleet",
        version: int = 0,
        front: RouterHandle | None = None,
        on_return: OnReturn | None = None,
    ) -> None:
        if not members:
            raise ValueError("a fleet needs at least one member")
        self.name, self.limits, self.version, self.on_return = (
            name,
            limits or FleetLimits(),
            version,
            on_return,
        )
        self._members = [Replica.of(label, source, version) for label, source in members.items()]
        self._front = Replica("router", None, front, version) if front else None
        self._metrics = FleetMetrics(members=len(members))
        self._patience = PausableClock(self.limits.tick_s, self._tick)
        self._weights_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._membership = asyncio.Event()
        self._routing = PrefixRouting(self.limits.affinity_slack)
        self._tasks: list[asyncio.Task[None]] = []
        self._abandoned: set[asyncio.Task[Generation]] = set()
        self._paused = False
        self._closed = False
        self._lost: str | None = None
        self._empty_s, self._logged_s, self._logged_retries = 0.0, 0.0, 0
        self._broken = False
        self._fed: Engine | None = None

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``. Raises ``EngineLost`` when no member is left, ``EngineFailure``
        for a bad request (at once) and for one that no member could serve within the limits.
        """
        self._begin()
        self._metrics.requests += 1
        try:
            generation = await self._served(request)
        except EngineFailure:
            self._metrics.refused += 1
            raise
        except asyncio.CancelledError:
            self._metrics.cancelled += 1
            raise
        self._metrics.answered += 1
        return generation

    async def _served(self, request: GenerationRequest) -> Generation:
        limits, started, errors, avoid = self.limits, self._patience.now, [], None
        seconds, total = limits.deadlines(request.sampling.max_new_tokens)
        while True:
            member = await self._choose(request, avoid, direct=bool(errors))
            asked = self._patience.now
            member.load += 1
            try:
                async with member.place(self._patience) as taken:
                    started += self._patience.now - asked
                    if not taken:
                        continue
                    return await self._attempt(
                        member, request, min(seconds, started + total - self._patience.now)
                    )
            except EngineLost:
                raise
            except EngineUnavailable as error:
                errors.append(f"{member.name}: {error}")
            finally:
                member.load -= 1
            avoid, waited = member, self._patience.now - started
            pause = limits.backoff(len(errors))
            if len(errors) >= limits.max_attempts or waited + pause >= total:
                raise EngineFailure(
                    f"the {self.name} gave a request up after {len(errors)} attempts in "
                    f"{waited:.1f} s: {'; '.join(errors)}"
                )
            self._metrics.retries += 1
            self._metrics.redone_prompt_tokens += len(request.prompt_ids)
            await asyncio.sleep(pause)

    async def _choose(
        self, request: GenerationRequest, avoid: Replica | None, direct: bool
    ) -> Replica:
        """The member for the next attempt; waits while paused and while nobody is up. Raises
        ``EngineLost``.
        """
        started = self._patience.now
        while True:
            self._refuse_closed()
            up = [] if self._paused else [member for member in self._members if member.up]
            if self._lost is not None and (self._broken or not up):
                raise EngineLost(
                    f"{self._lost}; this request waited {self._patience.now - started:.1f} s"
                )
            if up:
                front = self._front
                if front is not None and front.up and front.engine is self._fed and not direct:
                    return front
                return self._routing.choose(request.prompt_ids, up, avoid)
            await self._changed.wait()

    async def _attempt(
        self, member: Replica, request: GenerationRequest, seconds: float
    ) -> Generation:
        """One try on one member; raises ``EngineUnavailable`` when it is to be redone."""
        assert member.engine is not None
        task = asyncio.ensure_future(member.engine.generate(request))
        failures = member.failures
        try:
            if await self._patience.wait(task, seconds, member.interrupts):
                return self._answer(member, task, failures)
            if member.up:
                member.suspect(f"no answer within {seconds:.1f} s (request_timeout_s)")
            raise EngineUnavailable(f"{member.last_error} (while it served this request)")
        finally:
            if not task.done():
                self._abandon(task)

    def _answer(self, member: Replica, task: asyncio.Task[Generation], failures: int) -> Generation:
        try:
            generation = task.result()
        except asyncio.CancelledError:
            raise EngineUnavailable("the engine cancelled the request") from None
        except EngineLost as error:  # a member that is a fleet itself
            member.condemn(str(error))
            raise EngineUnavailable(str(error)) from error
        except EngineUnavailable as error:
            if member is not self._front:  # it passes on what its members say
                member.failures = max(
                    member.failures, failures + 1
                )  # a burst that fails together counts once
            member.suspect(error)
            raise
        if generation.finish_reason is FinishReason.ABORT:
            # Nobody here aborts a request and still waits for it: the server is stopping or was
            # told to by another.
            self._metrics.lost_response_tokens += len(generation.token_ids)
            raise EngineUnavailable(f"aborted after {len(generation.token_ids)} tokens")
        member.failures = member.outages = 0
        member.answered += 1
        member.last_answer = self._patience.now
        return generation

    def _abandon(self, task: asyncio.Task[Generation]) -> None:
        """Nobody waits for ``task`` any more: it may not delay us, and what it still brings is
        dropped.
        """
        task.cancel()
        self._abandoned.add(task)
        task.add_done_callback(self._late)

    def _late(self, task: asyncio.Task[Generation]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._metrics.late_answers += 1
            self._metrics.lost_response_tokens += len(task.result().token_ids)

    def members(self) -> dict[str, Engine]:
        """The engines that serve now, by name; control calls go to each of them."""
        return {m.name: m.engine for m in self._members if m.up and m.engine is not None}

    def metrics(self) -> FleetMetrics:
        """A snapshot."""
        load = {m.name: m.load for m in [*self._members, *([self._front] if self._front else [])]}
        return replace(self._metrics, members_up=sum(m.up for m in self._members), load=load)

    def changed(self) -> None:
        """Wake whoever waits for another state of a member (called by the minders)."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._membership.set()

    def count(self, *, outages: int = 0, restarts: int = 0) -> None:
        """Called by the minders."""
        self._metrics.outages += outages
        self._metrics.restarts += restarts
        self.log_metrics()

    def log_metrics(self) -> None:
        """One line."""
        self._logged_retries, self._logged_s = self._metrics.retries, self._patience.now
        log.info("%s: %s", self.name, self.metrics().line())

    def _tick(self, passed: float) -> None:
        if (
            self._metrics.retries != self._logged_retries
            and self._patience.now - self._logged_s >= _LOG_EVERY_S
        ):
            self.log_metrics()
        if self._broken:
            return
        states = {member.state for member in self._members}
        if states & {ReplicaState.HEALTHY, ReplicaState.STARTING}:
            self._empty_s = 0.0
            if ReplicaState.HEALTHY in states:
                self._lost = None
            return
        self._empty_s += passed
        if self._lost is None and (
            states == {ReplicaState.FAILED} or self._empty_s >= self.limits.pool_down_timeout_s
        ):
            why = "; ".join(
                f"{m.name}: {m.last_error}"
                + (
                    " (alive, but without the current weights)"
                    if m.state is ReplicaState.OUTDATED
                    else ""
                )
                for m in self._members
            )
            self._lost = (
                f"no server of the {self.name} is left: {len(self._members)} of {len(self._members)} are out "
                f"and none came back within {self._empty_s:.1f} s ({why})"
            )
            log.error("%s", self._lost)
            self.changed()

    @contextlib.asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[WeightUpdate]:
        """New weights for every engine in ``update.targets`` (living ones, also those that missed
        an update).

        Inside, say ``update.failed(engine, error)`` for each that did not take them: it is taken
        out. At the end the others serve ``version``. Nobody joins in between. Raises
        ``EngineUnavailable`` without a target and when all were lost, which ``until_updatable`` and
        another update may mend; ``EngineFailure`` when some refused.
        """
        self._begin()
        while self._first_start:
            await self._changed.wait()
        async with self._weights_lock:
            targets = [m for m in self._members if m.takes_weights]
            if not targets:
                raise EngineUnavailable(
                    f"weights version {version}: the {self.name} is out: {outlook(self._members)}"
                )
            update = WeightUpdate(
                version, {m.engine: m.name for m in targets if m.engine is not None}
            )
            try:
                yield update
            except BaseException as error:
                for member in targets:
                    spoil(member, f"the update to weights version {version} broke off: {error}")
                raise
            settle(update, targets, self.name)
            self.version = version

    @property
    def _first_start(self) -> bool:
        """Some server has not been up yet: an update waits for it."""
        return any(m.state is ReplicaState.STARTING and not m.was_up for m in self._members)

    async def until_updatable(self) -> None:
        """Wait until an update has a target: for the first start of every server, and for a return
        when all are out.

        Not while paused, when no time passes. Raises ``EngineLost`` when requests would.
        """
        self._begin()
        told = False
        while self._broken or self._first_start or not any(m.takes_weights for m in self._members):
            self._refuse_closed()
            if self._lost is not None:
                raise EngineLost(self._lost)
            if not (
                told
                or self._first_start
                or all(m.state is ReplicaState.FAILED for m in self._members)
            ):
                told = True
                log.warning(
                    "%s: new weights wait for the return of a server, up to %g s in which none is starting: %s",
                    self.name,
                    self.limits.pool_down_timeout_s,
                    outlook(self._members),
                )
            await self._changed.wait()

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """See ``Engine.update_weights``. With several members the tensors are held in memory until
        all have them: large models go through a transport of ``weight_sync`` and ``updating``.
        """
        async with self.updating(version) as update:
            shared = tensors if len(update.targets) == 1 else list(tensors)
            errors = await call_each(
                list(update.targets),
                lambda engine: engine.update_weights(shared, version),
                self.limits.update_timeout_s,
            )
            for engine, error in errors.items():
                update.failed(engine, error)

    async def pause(self) -> None:
        """See ``Engine.pause``. New requests wait here; a member that does not pause is taken out."""
        self._begin()
        self._paused = self._patience.stopped = True
        await self._control("pause")

    async def resume(self) -> None:
        """See ``Engine.resume``."""
        self._begin()
        self._paused = False  # first, so that a member that joins meanwhile does not stay paused
        await self._control("resume")
        self._patience.stopped = False
        self.changed()

    @property
    def paused(self) -> bool:
        """Between ``pause`` and ``resume``."""
        return self._paused

    async def _control(self, what: str) -> None:
        living = {
            m.engine: m
            for m in self._members
            if m.engine is not None and m.state in (ReplicaState.HEALTHY, ReplicaState.OUTDATED)
        }
        for member in living.values():
            member.paused = True
        errors = await call_each(
            list(living), lambda engine: getattr(engine, what)(), self.limits.control_timeout_s
        )
        for engine, member in living.items():
            if engine in errors:
                member.condemn(f"{what}: {errors[engine]}")
            else:
                member.paused = what == "pause"

    async def health(self) -> EngineHealth:
        """The sum over members; ``alive`` until closed or lost. Those that do not answer count as
        idle.
        """
        found: list[EngineHealth] = []

        async def ask(engine: Engine) -> None:
            found.append(await engine.health())

        if not self._closed:
            self._begin()
            await call_each(list(self.members().values()), ask, self.limits.control_timeout_s)
        return EngineHealth(
            alive=not self._closed and self._lost is None,
            paused=self._paused,
            running=sum(h.running for h in found),
            waiting=sum(h.waiting for h in found),
            weight_version=self.version,
            tokens_generated=sum(h.tokens_generated for h in found),
        )

    async def probe(self, timeout_s: float) -> None:
        """See ``Engine.probe``; the members are probed all the time."""
        if self._lost is not None:
            raise EngineUnavailable(self._lost)

    async def close(self) -> None:
        """Idempotent. Requests in flight end with ``EngineFailure``; every server that we started
        is killed.
        """
        if self._closed:
            return
        self._closed = True
        self.changed()
        everyone = [*self._members, *([self._front] if self._front else [])]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in everyone:
            member.last_error = f"the {self.name} was closed"
            member.interrupt()
        await asyncio.sleep(0)
        await call_each(
            [m.engine for m in everyone if m.engine is not None],
            lambda engine: engine.close(),
            self.limits.control_timeout_s,
        )
        await asyncio.gather(*(m.keeper.stop() for m in everyone if m.keeper is not None))
        log.info("%s closed: %s", self.name, self._metrics.line())

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EngineFailure(f"the {self.name} was closed")

    def _begin(self) -> None:
        """Start the clock and the minders in the event loop that is running."""
        self._refuse_closed()
        if self._tasks:
            return
        minders = [
            ServerSupervisor(self, self._patience, member, self._weights_lock)
            for member in self._members
        ]
        if self._front is not None:
            minders.append(
                ServerSupervisor(
                    self, self._patience, self._front, self._weights_lock, is_front=True
                )
            )
            self._tasks.append(
                asyncio.create_task(self._feed_front(), name=f"{self.name} router members")
            )
        self._tasks.append(asyncio.create_task(self._patience.run(), name=f"{self.name} clock"))
        self._tasks += [
            asyncio.create_task(minder.run(), name=f"{self.name} {minder.member.name}")
            for minder in minders
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def _feed_front(self) -> None:
        """Tell the router who is up, whenever that changes."""
        front, told = self._front, None
        assert front is not None and isinstance(front.keeper, RouterHandle)
        while True:
            await self._membership.wait()
            self._membership.clear()
            now = (front.engine, tuple(self.members().values()))
            if not front.up or now == told:
                continue
            try:
                await front.keeper.route_to(now[1])
                told, self._fed = now, front.engine
            except EngineFailure as error:
                front.condemn(str(error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A background task never ends by itself: what broke it must not leave requests waiting for
        ever.
        """
        if task.cancelled() or self._closed:
            return
        log.error("%s: task %s stopped", self.name, task.get_name(), exc_info=task.exception())
        error = task.exception()
        self._broken, self._lost = (
            True,
            f"the {self.name} broke down: {type(error).__name__}: {error}",
        )
        self.changed()
