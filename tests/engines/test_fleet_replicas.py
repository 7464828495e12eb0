"""Restarts, weights, pauses and the router of a fleet's replicas."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from fleet_cases import QUICK, FakeEngine, FakeLauncher, ask, running, until
from virtual_time import run

from spark_nemo.engines import EngineFailure, EngineLost, EngineUnavailable
from spark_nemo.engines.fleet import Fleet, FleetLimits, RouterHandle

WEIGHTS = [("w", None)]


def up(fleet: Fleet) -> int:
    return fleet.metrics().replicas_up


def test_a_killed_server_is_restarted_and_gets_the_current_weights_before_it_serves() -> None:
    """The hook is called once with the new engine and the fleet's version; no request reached it
    before.
    """

    async def scenario():
        launchers, calls = [FakeLauncher(i) for i in range(2)], []

        async def hook(engine, version):
            calls.append((engine, version, list(engine.seen)))
            engine.version = version

        async with running(launchers, on_return=hook) as fleet:
            await fleet.update_weights(WEIGHTS, 7)
            launchers[0].engine.dead = True
            await until(lambda: len(launchers[0].engines) == 2 and up(fleet) == 2)
            answers = await asyncio.gather(*(fleet.generate(ask(i)) for i in range(20)))
            return (
                calls,
                launchers[0].engine,
                {v for a in answers for v in a.weight_versions},
                fleet.metrics(),
            )

    calls, engine, versions, metrics = run(scenario())
    assert calls == [(engine, 7, [])] and versions == {7} and engine.seen
    assert metrics.restarts == 1


@pytest.mark.parametrize("hook", [None, "fails", "hangs"])
def test_without_current_weights_a_returning_server_waits_for_the_next_update(
    hook: str | None,
) -> None:
    """No hook, a failing one and a hanging one: it serves nothing until an update includes it."""

    async def scenario():
        launchers = [FakeLauncher(i) for i in range(2)]

        async def broken(engine, version):
            await asyncio.sleep(60 if hook == "hangs" else 0)
            raise EngineUnavailable("no such folder")

        async with running(launchers, on_return=broken if hook else None) as fleet:
            await fleet.update_weights(WEIGHTS, 1)
            launchers[0].engine.dead = True
            await until(lambda: len(launchers[0].engines) == 2)
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(20)))
            before = list(launchers[0].engine.seen), up(fleet)
            await until(lambda: fleet.metrics().states["m0"] == "outdated")
            await fleet.update_weights(WEIGHTS, 2)
            await until(lambda: up(fleet) == 2)
            return before, launchers[0].engine.version, list(fleet.replicas())

    before, version, replicas = run(scenario())
    assert before == ([], 1) and version == 2 and replicas == ["m0", "m1"]


def test_a_server_restarted_under_its_folders_weights_needs_no_hook() -> None:
    """A verifier pool is never updated: what restarts has the right weights."""

    async def scenario():
        launcher = FakeLauncher(0)
        async with running([launcher]) as fleet:
            await fleet.generate(ask(1))
            launcher.engine.dead = True
            answer = await fleet.generate(ask(2))
            return len(launcher.engines), answer

    starts, answer = run(scenario())
    assert starts == 2 and answer.token_ids == (2, 0)


def test_restarts_are_bounded_and_then_the_fleet_is_lost_with_the_reason() -> None:
    """max_restarts=2: two restarts, then EngineLost at once, not after the waiting time."""

    async def scenario():
        launcher = FakeLauncher(0, max_restarts=2)
        async with running([launcher], name="policy pool") as fleet:
            await fleet.generate(ask(1))
            for _ in range(3):
                launcher.engine.dead = True
                with_engines = len(launcher.engines)
                await until(
                    lambda: (
                        (len(launcher.engines) > with_engines and up(fleet) == 1)  # noqa: B023
                        or fleet.metrics().states["m0"] == "failed"
                    )
                )
            with pytest.raises(EngineLost, match="after 2 restarts within an hour") as raised:
                await fleet.generate(ask(2))
            return str(raised.value), len(launcher.engines)

    message, starts = run(scenario())
    assert starts == 3 and "policy pool" in message and "exit status -9" in message


def test_a_server_that_never_comes_up_is_not_tried_again() -> None:
    """Its settings are wrong; the message carries the end of its log."""

    async def scenario():
        launcher = FakeLauncher(0)
        launcher.fails_with = "exit status 2 before it served: unrecognized arguments: --atention"
        async with running([launcher]) as fleet:
            with pytest.raises(EngineLost, match="unrecognized arguments"):
                await fleet.generate(ask(1))
            with pytest.raises(EngineFailure, match="unrecognized arguments"):
                await fleet.update_weights(WEIGHTS, 1)
            return launcher.engines, fleet.metrics().restarts

    assert run(scenario()) == ([], 0)


def test_a_hung_server_of_ours_is_killed_and_restarted() -> None:
    """A SIGSTOP does not end the process: the probe finds it, the launcher kills it."""

    async def scenario():
        launchers = [FakeLauncher(i) for i in range(2)]
        async with running(launchers) as fleet:
            await fleet.generate(ask(1))
            await until(lambda: up(fleet) == 2)
            launchers[1].engine.hung = True
            await until(lambda: len(launchers[1].engines) == 2 and up(fleet) == 2)
            return launchers[1].stopped

    assert run(scenario()) == 1


def test_a_given_server_that_returns_serves_again() -> None:
    """Not ours, so not restarted: it is probed until it answers, and keeps its place when it missed
    no update.
    """

    async def scenario():
        engines = [FakeEngine(i) for i in range(2)]
        async with running(engines) as fleet:
            await fleet.generate(ask(1))
            await until(lambda: up(fleet) == 2)
            engines[0].hung = True
            await until(lambda: up(fleet) == 1)
            engines[0].hung = False
            await until(lambda: up(fleet) == 2)

    run(scenario())


def test_a_replica_that_fails_an_update_is_evicted_and_the_run_goes_on() -> None:
    """One of three fails the update: the others serve the new version; it serves nothing."""

    async def scenario():
        engines = [FakeEngine(i) for i in range(3)]
        async with running(engines) as fleet:
            await fleet.generate(ask(1))
            await until(lambda: up(fleet) == 3)
            engines[1].rejects_weights = True
            await fleet.update_weights(WEIGHTS, 4)
            engines[1].seen.clear()
            answers = await asyncio.gather(*(fleet.generate(ask(i)) for i in range(30)))
            return {v for a in answers for v in a.weight_versions}, engines[1].seen, fleet.version

    versions, seen, version = run(scenario())
    assert versions == {4} and version == 4 and seen == []


def test_weights_that_every_replica_rejects_change_nothing() -> None:
    """A tensor of another shape is the caller's mistake: an error, and all serve on under the old
    version.
    """

    async def scenario():
        engines = [FakeEngine(i) for i in range(2)]
        async with running(engines) as fleet:
            await fleet.generate(ask(1))
            await until(lambda: up(fleet) == 2)
            for engine in engines:
                engine.rejects_weights = True
            with pytest.raises(EngineFailure, match="m0: engine 0: tensor of another shape; m1: "):
                await fleet.update_weights(WEIGHTS, 1)
            await asyncio.sleep(0.05)
            return up(fleet), fleet.version, (await fleet.generate(ask(2))).weight_versions

    replicas, version, versions = run(scenario())
    assert replicas == 2 and version == 0 and set(versions) == {0}


def test_an_update_waits_until_all_servers_have_started_once() -> None:
    """Stage III updates before it generates: a server that starts slower than the others is not
    left behind.
    """

    async def scenario():
        launchers = [FakeLauncher(0, start_s=0.01), FakeLauncher(1, start_s=0.15)]
        async with running(launchers) as fleet:
            await fleet.update_weights(WEIGHTS, 3)
            return [launcher.engine.version for launcher in launchers], up(fleet)

    assert run(scenario()) == ([3, 3], 2)


def test_time_paused_is_no_deadline_and_requests_wait() -> None:
    """A pause of several deadlines: what ran goes on, what came meanwhile is served after it,
    nothing is retried.
    """

    async def scenario():
        engines = [FakeEngine(i, delay=0.03) for i in range(2)]
        async with running(engines) as fleet:
            work = [asyncio.create_task(fleet.generate(ask(i))) for i in range(6)]
            await until(lambda: sum(engine.running for engine in engines) == 6)
            await fleet.pause()
            work += [asyncio.create_task(fleet.generate(ask(10 + i))) for i in range(6)]
            await asyncio.sleep(4 * QUICK.request_timeout_s)
            waiting = sum(len(engine.seen) for engine in engines)
            await fleet.resume()
            await asyncio.gather(*work)
            return waiting, fleet.metrics()

    waiting, metrics = run(scenario())
    assert waiting == 6 and metrics.retries == metrics.outages == 0 and metrics.answered == 12


def test_a_server_that_returns_during_a_pause_is_paused_and_resumed_with_the_others() -> None:
    """And a server that missed the resume is resumed when it comes back."""

    async def scenario():
        launcher, given = FakeLauncher(0), FakeEngine(1)
        async with running({"kept": launcher, "given": given}) as fleet:
            await fleet.generate(ask(1))
            await until(lambda: up(fleet) == 2)
            await fleet.pause()
            launcher.engine.dead = True
            await until(lambda: len(launcher.engines) == 2 and up(fleet) == 2)
            during = launcher.engine.paused
            given.hung = True
            await fleet.resume()
            missed = given.paused
            given.hung = False
            await until(lambda: up(fleet) == 2 and not given.paused)
            return during, missed, launcher.engine.paused

    assert run(scenario()) == (True, True, False)


def test_closing_ends_what_runs_and_kills_what_was_started() -> None:
    """Requests in flight fail, launched servers stop, a second close does nothing."""

    async def scenario():
        launcher = FakeLauncher(0, delay=10)
        fleet = Fleet({"m0": launcher}, FleetLimits())
        work = asyncio.create_task(fleet.generate(ask(1)))
        await until(lambda: bool(launcher.engines) and launcher.engine.running == 1)
        await fleet.close()
        await fleet.close()
        with pytest.raises(EngineFailure, match="closed"):
            await work
        with pytest.raises(EngineFailure, match="closed"):
            await fleet.generate(ask(1))
        return launcher.stopped, launcher.engine.closed, (await fleet.health()).alive

    assert run(scenario()) == (1, True, False)


class FakeRouter(FakeEngine):
    """Passes requests on to its targets, and fails with them."""

    def __init__(self) -> None:
        super().__init__(99)
        self.targets: list[FakeEngine] = []

    async def generate(self, request):
        self.seen.append(request.prompt_ids)
        await self._alive()
        if not self.targets:
            raise EngineUnavailable("503 no worker")
        return await self.targets[len(self.seen) % len(self.targets)].generate(request)


class FakeRouterHandle(FakeLauncher, RouterHandle):
    """Launcher of a ``FakeRouter``."""

    async def start(self):
        await asyncio.sleep(self.start_s)
        self.engines.append(FakeRouter())
        return self.engine

    async def route_to(self, engines):
        self.engine.targets = list(engines)


def test_a_router_gets_first_attempts_and_the_serving_replicas() -> None:
    """All requests pass through it while it lives; a replica that dies is removed from its list."""

    async def scenario():
        launchers, router = [FakeLauncher(i, max_restarts=0) for i in range(2)], FakeRouterHandle(9)
        async with running(launchers, router=router) as fleet:
            await fleet.generate(ask(0))
            await until(lambda: bool(router.engines) and len(router.engine.targets) == 2)
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(1, 21)))
            through = len(router.engine.seen)
            launchers[0].engine.dead = True
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(21, 41)))
            await until(lambda: router.engine.targets == [launchers[1].engine])
            return through, fleet.metrics()

    through, metrics = run(scenario())
    assert through >= 20 and metrics.answered == 41


@pytest.mark.parametrize("fate", ["dead", "hung"])
def test_a_killed_router_costs_no_request_and_is_started_again(fate: str) -> None:
    """Requests in flight through it are retried directly; the next router gets all replicas."""

    async def scenario():
        launchers, router = [FakeLauncher(i, delay=0.03) for i in range(2)], FakeRouterHandle(9)
        async with running(launchers, router=router) as fleet:
            await fleet.generate(ask(0))
            await until(lambda: bool(router.engines) and len(router.engine.targets) == 2)
            work = [asyncio.create_task(fleet.generate(ask(i))) for i in range(40)]
            await until(lambda: len(router.engine.seen) > 5)
            setattr(router.engine, fate, True)
            answers = await asyncio.gather(*work)
            await until(lambda: len(router.engines) == 2 and len(router.engine.targets) == 2)
            await fleet.generate(ask(50))
            return (
                [answer.token_ids[0] for answer in answers],
                len(router.engine.seen),
                fleet.metrics(),
            )

    answers, through, metrics = run(scenario())
    assert answers == list(range(40)) and through >= 1 and metrics.replicas_up == 2


def test_a_server_that_dies_after_it_took_an_update_is_not_credited_with_it() -> None:
    """It takes version 5, dies and is restarted with the folder's weights while the update still
    runs for another: afterwards it may not pass for version 5.
    """

    async def scenario():
        launchers = [FakeLauncher(i) for i in range(2)]
        async with running(launchers) as fleet:
            async with fleet.updating(5) as update:
                for engine in update.targets:
                    engine.version = 5
                launchers[0].engine.dead = True
                await until(lambda: len(launchers[0].engines) == 2 and launchers[0].engine.probed)
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(10)))
            return launchers[0].engine.seen, list(fleet.replicas())

    assert run(scenario()) == ([], ["m1"])


def test_a_server_that_is_out_when_an_update_ends_has_not_got_it() -> None:
    """The only one takes version 5 and dies, and is not restarted yet: the update reached no
    server and may be repeated with its successor, which is not evicted for what its predecessor
    did.
    """

    async def scenario():
        launcher = FakeLauncher(0)
        limits = dataclasses.replace(QUICK, backoff_s=0.2, max_backoff_s=0.2, pool_down_timeout_s=3)
        async with running([launcher], limits) as fleet:
            await fleet.update_weights(WEIGHTS, 4)
            with pytest.raises(
                EngineUnavailable, match="reached no server of the fleet: m0: exit status -9"
            ):
                async with fleet.updating(5) as update:
                    (engine,) = update.targets
                    engine.version, engine.dead = 5, True
                    await until(lambda: up(fleet) == 0)
            await fleet.wait_updatable()
            await fleet.update_weights(WEIGHTS, 6)
            return fleet.version, launcher.engine.version, len(launcher.engines)

    assert run(scenario()) == (6, 6, 2)


def test_a_server_that_is_being_given_weights_is_not_lost() -> None:
    """A server that loads weights is waited for, also beyond pool_down_timeout_s."""

    async def scenario():
        engine = FakeEngine(0)

        async def slow(engine, version):
            await asyncio.sleep(3 * QUICK.pool_down_timeout_s)
            engine.version = version

        async with running(
            [engine], dataclasses.replace(QUICK, update_timeout_s=5), on_return=slow
        ) as fleet:
            await fleet.update_weights(WEIGHTS, 1)
            engine.dead = True
            await until(lambda: up(fleet) == 0)
            engine.version, engine.dead = 0, False
            return (await fleet.generate(ask(1))).weight_versions

    assert set(run(scenario())) == {1}


def test_a_given_server_that_returns_with_other_weights_must_be_updated() -> None:
    """Its owner restarted it: what it reports is compared with what we gave it."""

    async def scenario():
        engines, calls = [FakeEngine(i) for i in range(2)], []

        async def hook(engine, version):
            calls.append(version)
            engine.version = version

        async with running(engines, on_return=hook) as fleet:
            await fleet.update_weights(WEIGHTS, 3)
            engines[0].dead = True
            await until(lambda: up(fleet) == 1)
            engines[0].version, engines[0].dead = 0, False
            await until(lambda: up(fleet) == 2)
            return calls, engines[0].version

    assert run(scenario()) == ([3], 3)
