"""Serve requests on several replicas and survive the death of any of them.

A request goes to one replica at a time and is answered once. When its replica dies, hangs or fails
to serve it, the attempt is abandoned (a late answer is dropped) and the request is retried on
another replica. One supervisor task watches each replica (``health_monitor.py``). With a router,
first attempts go through it and retries go directly to a replica.

The fleet is the only layer that bounds, times and retries a served request: ``Replica.slot`` is the
bound, ``FleetLimits`` has the deadlines and the number of attempts.

One event loop owns a fleet; its tasks start with the first call that is awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace

import torch

from ..async_utils import call_each
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
from .health_monitor import OnReturn, ServerSupervisor
from .pausable_clock import PausableClock
from .replica import FleetLimits, Replica, ReplicaState, RouterHandle, ServerLauncher
from .routing import PrefixRouting

log = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0


@dataclass(slots=True)
class FleetMetrics:
    """Totals since the start, and the present load.

    Tokens that a dead server had sampled are not known.
    """

    requests: int = 0
    answered: int = 0
    failed: int = 0
    """Requests that ended with an ``EngineFailure``: invalid ones, and those out of attempts."""
    cancelled: int = 0
    retries: int = 0
    retried_prompt_tokens: int = 0
    """Prompt tokens sent once more because an attempt failed."""
    lost_response_tokens: int = 0
    """Sampled tokens that were discarded, where known: aborted and late answers."""
    late_answers: int = 0
    """Answers that came after their attempt was abandoned; dropped."""
    outages: int = 0
    restarts: int = 0
    replicas: int = 0
    replicas_up: int = 0
    load: dict[str, int] = field(default_factory=dict)
    """Requests in flight by replica."""
    states: dict[str, ReplicaState] = field(default_factory=dict)
    """State by replica."""

    def line(self) -> str:
        """Format the metrics for the log."""
        return (
            f"{self.replicas_up} of {self.replicas} replicas up, {self.requests} requests, "
            f"{self.answered} answered, {self.retries} retries "
            f"({self.retried_prompt_tokens} prompt tokens again), {self.outages} outages, "
            f"{self.restarts} restarts, in flight {self.load}"
        )


@dataclass(slots=True)
class WeightUpdate:
    """One update of a fleet: its targets, and the failures that the caller reports."""

    version: int
    targets: dict[Engine, str]
    """Engine -> name of its replica."""
    errors: dict[Engine, EngineFailure] = field(default_factory=dict)

    def failed(self, engine: Engine, error: EngineFailure) -> None:
        """Record that ``engine`` did not take the weights."""
        self.errors[engine] = error


class Fleet(Engine):
    """An engine over ``replicas``: name -> a running engine, or the launcher of its server.

    ``version`` names the weights that every replica loads from its own folder. ``on_return(engine,
    version)`` must bring a returning engine to ``version`` and raise ``EngineFailure`` when it
    cannot. Without it, or when it fails, a replica that missed an update waits for the next one.
    """

    def __init__(
        self,
        replicas: dict[str, Engine | ServerLauncher],
        limits: FleetLimits | None = None,
        *,
        name: str = "fleet",
        version: int = 0,
        router: RouterHandle | None = None,
        on_return: OnReturn | None = None,
    ) -> None:
        if not replicas:
            raise ValueError("replicas={}: a fleet needs at least one replica")
        self.name = name
        self.limits = limits or FleetLimits()
        self.version = version
        self.on_return = on_return
        self._replicas = [Replica(label, source, version) for label, source in replicas.items()]
        self._router = None if router is None else Replica("router", router, version)
        self._router_engine: Engine | None = None
        """The router that knows its replicas; another one after a restart."""
        self._routing = PrefixRouting(self.limits.affinity_slack)
        self._clock = PausableClock(self.limits.tick_s, self._on_tick)
        # Held by an update and by a replica that joins: neither may miss the other.
        self._weights_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._routes_changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._abandoned: set[asyncio.Task[Generation]] = set()
        self._paused = False
        self._closed = False
        self._lost: str | None = None
        """Why no request can be served any more."""
        self._broken = False
        """True if a background task of the fleet failed: no replica can end ``_lost``."""
        self._down_s = 0.0
        self._metrics = FleetMetrics(replicas=len(replicas))
        self._logged_at = 0.0
        self._logged_retries = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``.

        Raises ``EngineLost`` when no replica is left, and ``EngineFailure`` for an invalid request
        (at once) or one that no replica served within the limits.
        """
        self._ensure_started()
        self._metrics.requests += 1
        try:
            generation = await self._serve(request)
        except EngineFailure:
            self._metrics.failed += 1
            raise
        except asyncio.CancelledError:
            self._metrics.cancelled += 1
            raise
        self._metrics.answered += 1
        return generation

    async def _serve(self, request: GenerationRequest) -> Generation:
        """Try replicas one after another until one answers or the limits are reached."""
        attempt_s, total_s = self.limits.deadlines(request.sampling.max_new_tokens)
        started = self._clock.now
        errors: list[str] = []
        avoid: Replica | None = None
        while True:
            replica = await self._choose(request, avoid, direct=bool(errors))
            queued_at = self._clock.now
            replica.load += 1
            try:
                async with replica.slot(self._clock) as acquired:
                    # Time in the queue of a healthy replica counts towards no deadline.
                    started += self._clock.now - queued_at
                    if not acquired:
                        continue
                    remaining_s = started + total_s - self._clock.now
                    return await self._attempt(replica, request, min(attempt_s, remaining_s))
            except EngineUnavailable as error:
                errors.append(f"{replica.name}: {error}")
            finally:
                replica.load -= 1
            avoid = replica
            elapsed_s = self._clock.now - started
            pause_s = self.limits.backoff(len(errors))
            if len(errors) >= self.limits.max_attempts or elapsed_s + pause_s >= total_s:
                raise EngineFailure(
                    f"request failed on the {self.name} after {len(errors)} attempts in "
                    f"{elapsed_s:.1f} s: {'; '.join(errors)}"
                )
            self._metrics.retries += 1
            self._metrics.retried_prompt_tokens += len(request.prompt_ids)
            await asyncio.sleep(pause_s)

    async def _choose(
        self, request: GenerationRequest, avoid: Replica | None, direct: bool
    ) -> Replica:
        """Return the replica for the next attempt; waits while paused or while none is up.

        ``direct`` bypasses the router. Raises ``EngineLost``.
        """
        started = self._clock.now
        while True:
            self._require_open()
            serving: list[Replica] = []
            if not self._paused:
                serving = [replica for replica in self._replicas if replica.serving]
            if self._lost is not None and (self._broken or not serving):
                waited_s = self._clock.now - started
                raise EngineLost(f"{self._lost}; this request waited {waited_s:.1f} s")
            if serving:
                if self._router_usable() and not direct:
                    assert self._router is not None
                    return self._router
                return self._routing.choose(request.prompt_ids, serving, avoid)
            await self._changed.wait()

    def _router_usable(self) -> bool:
        router = self._router
        return router is not None and router.serving and router.engine is self._router_engine

    async def _attempt(
        self, replica: Replica, request: GenerationRequest, seconds: float
    ) -> Generation:
        """Send the request to one replica; raises ``EngineUnavailable`` if it should be retried."""
        assert replica.engine is not None
        task = asyncio.ensure_future(replica.engine.generate(request))
        failures_before = replica.failures
        try:
            if await self._clock.wait(task, seconds, replica.interrupts):
                return self._result(replica, task, failures_before)
            if replica.serving:
                replica.mark_suspect(f"no answer within {seconds:.1f} s (request_timeout_s)")
            raise EngineUnavailable(f"{replica.last_error} (while it served this request)")
        finally:
            if not task.done():
                self._abandon(task)

    def _result(
        self, replica: Replica, task: asyncio.Task[Generation], failures_before: int
    ) -> Generation:
        """Return the answer of a finished attempt and update the replica's health."""
        try:
            generation = task.result()
        except asyncio.CancelledError:
            raise EngineUnavailable("the engine cancelled the request") from None
        except EngineLost as error:  # the replica is a fleet itself
            replica.evict(str(error))
            raise EngineUnavailable(str(error)) from error
        except EngineUnavailable as error:
            # A failure behind the router is a failure of one of its servers, not of the router.
            if replica is not self._router:
                self._count_failure(replica, failures_before)
            replica.mark_suspect(error)
            raise
        if generation.finish_reason is FinishReason.ABORT:
            # This fleet did not abort the request: the server is shutting down, or another client
            # aborted it. A shortened sample must not pass for a complete one.
            self._metrics.lost_response_tokens += len(generation.token_ids)
            raise EngineUnavailable(f"aborted after {len(generation.token_ids)} tokens")
        replica.failures = 0
        replica.outages = 0
        replica.last_answer = self._clock.now
        return generation

    def _count_failure(self, replica: Replica, failures_before: int) -> None:
        # Requests that were in flight together and fail together count as one failure. So do the
        # requests that follow them at once from the queue: a server that rejects requests for a
        # moment (503) must not be restarted, which takes minutes.
        now = self._clock.now
        together = replica.failures > failures_before
        at_once = now - replica.last_failure < self.limits.backoff(max(1, replica.failures))
        if not together and not at_once:
            replica.failures += 1
            replica.last_failure = now

    def _abandon(self, task: asyncio.Task[Generation]) -> None:
        """Cancel an attempt without waiting for its end; a late answer is dropped and counted."""
        task.cancel()
        # asyncio keeps weak references only: without this set the task could be collected.
        self._abandoned.add(task)
        task.add_done_callback(self._on_late_answer)

    def _on_late_answer(self, task: asyncio.Task[Generation]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._metrics.late_answers += 1
            self._metrics.lost_response_tokens += len(task.result().token_ids)

    def replicas(self) -> dict[str, Engine]:
        """Return the engines that serve now, by name; control calls go to each of them."""
        return {
            replica.name: replica.engine
            for replica in self._replicas
            if replica.serving and replica.engine is not None
        }

    def metrics(self) -> FleetMetrics:
        """Return a snapshot of the metrics."""
        return replace(
            self._metrics,
            replicas_up=sum(replica.serving for replica in self._replicas),
            load={replica.name: replica.load for replica in self._all_replicas()},
            states={replica.name: replica.state for replica in self._all_replicas()},
        )

    def _all_replicas(self) -> list[Replica]:
        """Return the replicas and the router, if there is one."""
        return self._replicas if self._router is None else [*self._replicas, self._router]

    @contextlib.asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[WeightUpdate]:
        """Bring every replica that is alive to ``version``; the caller sends the weights inside.

        The caller reports each engine that did not take the weights by ``update.failed(engine,
        error)``. No replica joins while the update runs. What becomes of each target at the end is
        in ``_finalize_update``. Raises ``EngineUnavailable`` without a target and when all targets
        died: after ``wait_updatable`` the update can be repeated. Raises ``EngineFailure`` when no
        target took the weights and some rejected them.
        """
        self._ensure_started()
        while self._first_start_pending:
            await self._changed.wait()
        async with self._weights_lock:
            targets = [replica for replica in self._replicas if replica.updatable]
            if not targets:
                raise EngineUnavailable(
                    f"weights version {version}: no replica of the {self.name} is up: "
                    f"{self._recovery_status()}"
                )
            update = WeightUpdate(
                version,
                {replica.engine: replica.name for replica in targets if replica.engine is not None},
            )
            try:
                yield update
            except BaseException as error:
                for replica in targets:
                    replica.invalidate_weights(
                        f"the update to weights version {version} was interrupted: {error}"
                    )
                raise
            self._finalize_update(update, targets)
            self.version = version

    def _finalize_update(self, update: WeightUpdate, targets: list[Replica]) -> None:
        """Record which weights each target serves now; raises when no target took the update.

        A server that dies in a push ends here in one of three ways:

        * it is still down: it counts as failed, even if it had taken the weights before it died;
        * it was restarted meanwhile: the new process has its folder's weights. It is neither
          credited with the update nor evicted, and joins with ``on_return`` or the next update;
        * every target died: ``EngineUnavailable``, and ``weight_sync`` repeats the push after
          ``wait_updatable``.
        """
        # A restarted server has another engine object, which was not a target.
        targets = [replica for replica in targets if replica.engine in update.targets]
        failed: dict[Replica, EngineFailure] = {}
        for replica in targets:
            assert replica.engine is not None
            if replica.engine in update.errors:
                failed[replica] = update.errors[replica.engine]
            elif not replica.updatable:
                failed[replica] = EngineUnavailable(replica.last_error)
        any_died = any(isinstance(error, EngineUnavailable) for error in failed.values())
        all_died = all(isinstance(error, EngineUnavailable) for error in failed.values())
        none_updated = len(failed) == len(targets)
        # Weights that every replica rejects (wrong names or shapes) changed nothing anywhere: the
        # replicas keep serving the old ones.
        all_rejected = none_updated and not any_died
        for replica in targets:
            if replica not in failed:
                replica.version = update.version
                replica.wake.set()
            elif not all_rejected:
                replica.invalidate_weights(f"weights version {update.version}: {failed[replica]}")
        if none_updated:
            reasons = [f"{replica.name}: {error}" for replica, error in failed.items()]
            message = (
                f"weights version {update.version} reached no server of the {self.name}: "
                f"{'; '.join(reasons) or 'all died and were restarted'}"
            )
            raise EngineUnavailable(message) if all_died else EngineFailure(message)

    async def wait_updatable(self) -> None:
        """Wait until an update has a target.

        Waits for the first start of every server and, when all replicas are out, for one to return.
        Do not call it while paused, when no time passes. Raises ``EngineLost`` when requests would.
        """
        self._ensure_started()
        warned = False
        while not self._update_possible():
            self._require_open()
            if self._lost is not None:
                raise EngineLost(self._lost)
            all_failed = all(replica.state is ReplicaState.FAILED for replica in self._replicas)
            if not warned and not self._first_start_pending and not all_failed:
                warned = True
                log.warning(
                    "%s: new weights wait for the return of a server, up to %g s in which none is "
                    "starting: %s",
                    self.name,
                    self.limits.pool_down_timeout_s,
                    self._recovery_status(),
                )
            await self._changed.wait()

    def _update_possible(self) -> bool:
        if self._broken or self._first_start_pending:
            return False
        return any(replica.updatable for replica in self._replicas)

    @property
    def _first_start_pending(self) -> bool:
        """True if some server has never been up yet: an update waits for it."""
        return any(
            replica.state is ReplicaState.STARTING and not replica.was_healthy
            for replica in self._replicas
        )

    def _recovery_status(self) -> str:
        return "; ".join(replica.recovery_status() for replica in self._replicas)

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """See ``Engine.update_weights``.

        With several replicas the tensors are held in memory until all have them: large models go
        through a transport of ``weight_sync`` and ``updating``.
        """
        async with self.updating(version) as update:
            shared = tensors if len(update.targets) == 1 else list(tensors)
            errors = await call_each(
                update.targets,
                lambda engine: engine.update_weights(shared, version),
                self.limits.update_timeout_s,
                "update_weights",
            )
            for engine, error in errors.items():
                update.failed(engine, error)

    async def pause(self) -> None:
        """See ``Engine.pause``. New requests wait; a replica that does not pause is evicted."""
        self._ensure_started()
        self._paused = True
        self._clock.stopped = True
        await self._pause_replicas(True)

    async def resume(self) -> None:
        """See ``Engine.resume``."""
        self._ensure_started()
        # Before the calls, so that a replica that joins meanwhile does not stay paused.
        self._paused = False
        await self._pause_replicas(False)
        self._clock.stopped = False
        self.notify_changed()

    @property
    def paused(self) -> bool:
        """True between ``pause`` and ``resume``."""
        return self._paused

    async def _pause_replicas(self, pausing: bool) -> None:
        living = {
            replica.engine: replica
            for replica in self._replicas
            if replica.engine is not None
            and replica.state in (ReplicaState.HEALTHY, ReplicaState.OUTDATED)
        }
        for replica in living.values():
            replica.paused = True  # possibly, until the call below has succeeded
        errors = await call_each(
            living,
            lambda engine: engine.pause() if pausing else engine.resume(),
            self.limits.control_timeout_s,
            "the reply",
        )
        for engine, replica in living.items():
            if engine in errors:
                what = "pause" if pausing else "resume"
                replica.evict(f"{what}: {errors[engine]}")
            else:
                replica.paused = pausing

    async def health(self) -> EngineHealth:
        """Return the sum over the replicas; ``alive`` until the fleet is closed or lost.

        A replica that does not answer counts as idle.
        """
        found: list[EngineHealth] = []

        async def collect(engine: Engine) -> None:
            found.append(await engine.health())

        if not self._closed:
            self._ensure_started()
            await call_each(
                self.replicas().values(), collect, self.limits.control_timeout_s, "health"
            )
        return EngineHealth(
            alive=not self._closed and self._lost is None,
            paused=self._paused,
            running=sum(health.running for health in found),
            waiting=sum(health.waiting for health in found),
            weight_version=self.version,
            tokens_generated=sum(health.tokens_generated for health in found),
        )

    async def probe(self, timeout_s: float) -> None:
        """See ``Engine.probe``. The supervisors probe the replicas; this reports their result."""
        if self._lost is not None:
            raise EngineUnavailable(self._lost)

    async def close(self) -> None:
        """See ``Engine.close``. Also kills every launched server; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.notify_changed()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        replicas = self._all_replicas()
        for replica in replicas:
            replica.last_error = f"the {self.name} was closed"
            replica.interrupt()
        await asyncio.sleep(0)  # let the interrupted requests raise before their engines close
        await call_each(
            [replica.engine for replica in replicas if replica.engine is not None],
            lambda engine: engine.close(),
            self.limits.control_timeout_s,
            "close",
        )
        launchers = [replica.launcher for replica in replicas if replica.launcher is not None]
        await asyncio.gather(*(launcher.stop() for launcher in launchers))
        log.info("%s closed: %s", self.name, self._metrics.line())

    # What the supervisors call (``health_monitor.SupervisedFleet``).

    def notify_changed(self) -> None:
        """Wake every wait for a change of some replica's state."""
        # A new event for later waits: clearing the old one could lose the wake-up.
        self._changed.set()
        self._changed = asyncio.Event()
        self._routes_changed.set()

    def count(self, *, outages: int = 0, restarts: int = 0) -> None:
        """Add to the metrics and log them."""
        self._metrics.outages += outages
        self._metrics.restarts += restarts
        self.log_metrics()

    def log_metrics(self) -> None:
        """Log the metrics in one line."""
        self._logged_retries = self._metrics.retries
        self._logged_at = self._clock.now
        log.info("%s: %s", self.name, self.metrics().line())

    # Background tasks.

    def _ensure_started(self) -> None:
        """Start the clock and the supervisors in the running event loop, once."""
        self._require_open()
        if self._tasks:
            return
        work = {"clock": self._clock.run()}
        for replica in self._all_replicas():
            supervisor = ServerSupervisor(
                self,
                self._clock,
                replica,
                self._weights_lock,
                is_router=replica is self._router,
            )
            work[replica.name] = supervisor.run()
        if self._router is not None:
            work["router routes"] = self._keep_routes(self._router)
        for name, coroutine in work.items():
            task = asyncio.create_task(coroutine, name=f"{self.name} {name}")
            task.add_done_callback(self._on_task_end)
            self._tasks.append(task)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineFailure(f"the {self.name} was closed")

    async def _keep_routes(self, router: Replica) -> None:
        """Send the router the list of serving replicas whenever it changes."""
        assert isinstance(router.launcher, RouterHandle)
        known = None
        while True:
            await self._routes_changed.wait()
            # Before the list is read: a change during the call below runs the loop again.
            self._routes_changed.clear()
            routes = (router.engine, tuple(self.replicas().values()))
            if not router.serving or routes == known:
                continue
            try:
                await router.launcher.route_to(routes[1])
                known = routes
                self._router_engine = router.engine
            except EngineFailure as error:
                router.evict(str(error))

    def _on_tick(self, passed: float) -> None:
        """Log now and then, and declare the fleet lost when it was down for too long."""
        new_retries = self._metrics.retries != self._logged_retries
        if new_retries and self._clock.now - self._logged_at >= _LOG_EVERY_S:
            self.log_metrics()
        if self._broken:
            return
        states = {replica.state for replica in self._replicas}
        if states & {ReplicaState.HEALTHY, ReplicaState.STARTING}:
            self._down_s = 0.0
            if ReplicaState.HEALTHY in states:
                self._lost = None
            return
        self._down_s += passed
        timed_out = self._down_s >= self.limits.pool_down_timeout_s
        if self._lost is None and (timed_out or states == {ReplicaState.FAILED}):
            reasons = [self._outage_reason(replica) for replica in self._replicas]
            total = len(self._replicas)
            self._lost = (
                f"no server of the {self.name} is left: {total} of {total} are out and none came "
                f"back within {self._down_s:.1f} s ({'; '.join(reasons)})"
            )
            log.error("%s", self._lost)
            self.notify_changed()

    @staticmethod
    def _outage_reason(replica: Replica) -> str:
        reason = f"{replica.name}: {replica.last_error}"
        if replica.state is ReplicaState.OUTDATED:
            reason += " (alive, but without the current weights)"
        return reason

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """Fail every request when a background task ended, which is a bug: they would hang."""
        if task.cancelled() or self._closed:
            return
        error = task.exception()
        log.error("%s: task %s ended", self.name, task.get_name(), exc_info=error)
        self._broken = True
        self._lost = f"internal error in the {self.name}: {type(error).__name__}: {error}"
        self.notify_changed()
