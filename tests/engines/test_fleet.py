"""A fleet of fake engines: the choice of a replica, and one result per request whatever dies."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import pytest
from engine_cases import generate_all
from fleet_cases import FakeEngine, FakeLauncher, ask, running, trouble, until
from virtual_time import block_event_loop, now, run

from spark_nemo.engines import (
    EngineFailure,
    EngineLost,
    EngineUnavailable,
    FinishReason,
    Generation,
)
from spark_nemo.engines.fleet import FleetLimits


def test_requests_spread_over_replicas_and_a_prompt_stays_where_it_was() -> None:
    """64 different prompts at once: equal shares. 16 votes about each of 8 prompts: every prompt
    goes to one replica.
    """

    async def scenario():
        engines = [FakeEngine(i) for i in range(4)]
        async with running(engines) as fleet:
            await fleet.health()  # the first call starts it
            await until(lambda: fleet.metrics().replicas_up == 4)
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(64)))
            shares = [len(engine.seen) for engine in engines]
            for engine in engines:
                engine.seen.clear()
            await asyncio.gather(*(fleet.generate(ask(100 + i // 16)) for i in range(128)))
            homes = Counter(prompt for engine in engines for prompt in set(engine.seen))
        return shares, homes

    shares, homes = run(scenario())
    assert shares == [16] * 4 and set(homes.values()) == {1} and len(homes) == 8


def test_affinity_gives_way_to_load() -> None:
    """One prompt 100 times at once does not pile up on one of two replicas."""

    async def scenario():
        engines = [FakeEngine(i, delay=0.02) for i in range(2)]
        async with running(engines) as fleet:
            await fleet.generate(ask(7))
            await asyncio.gather(*(fleet.generate(ask(7)) for _ in range(100)))
        return [len(engine.seen) for engine in engines]

    assert min(run(scenario())) > 35


def test_a_dead_replica_costs_a_retry_and_no_request() -> None:
    """Requests on the one that dies are retried on the other, each is answered once and counted."""

    async def scenario():
        engines = [FakeEngine(i, delay=0.02) for i in range(2)]
        async with running(engines) as fleet:
            work = [asyncio.create_task(fleet.generate(ask(i))) for i in range(40)]
            await until(lambda: engines[1].running > 5)
            engines[1].dead = True
            answers = await asyncio.gather(*work)
            return answers, fleet.metrics()

    answers, metrics = run(scenario())
    assert [answer.token_ids[0] for answer in answers] == list(range(40))
    assert (
        metrics.retries > 5 and metrics.answered == metrics.requests == 40 and metrics.outages >= 1
    )
    assert metrics.retried_prompt_tokens == metrics.retries


def test_a_hung_replica_is_found_by_a_probe_long_before_the_request_deadline() -> None:
    """With a request deadline of a minute, hanging requests move within the probe's time."""

    async def scenario():
        limits = FleetLimits(
            request_timeout_s=60, probe_every_s=0.05, probe_timeout_s=0.1, backoff_s=0.01
        )
        engines = [FakeEngine(i, delay=0.01) for i in range(2)]
        async with running(engines, limits) as fleet:
            await fleet.generate(ask(0))
            engines[0].hung = True
            begin = now()
            answers = await asyncio.gather(*(fleet.generate(ask(i)) for i in range(20)))
            return answers, now() - begin

    answers, seconds = run(scenario())
    assert len(answers) == 20 and seconds < 2


def test_a_slow_request_on_a_healthy_replica_does_not_evict_it() -> None:
    """A request that is over its deadline everywhere fails; the replicas pass probes and stay."""

    async def scenario():
        engines = [FakeEngine(i, delay=10) for i in range(2)]
        limits = FleetLimits(
            request_timeout_s=0.05,
            probe_every_s=0.05,
            probe_timeout_s=0.2,
            backoff_s=0.01,
            max_attempts=3,
            total_timeout_s=5,
        )
        async with running(engines, limits) as fleet:
            with pytest.raises(
                EngineFailure, match="request failed on the fleet after 3 attempts"
            ) as raised:
                await fleet.generate(ask(1))
            return raised.value, fleet.metrics()

    error, metrics = run(scenario())
    assert metrics.outages == 0 and metrics.replicas_up == 2 and not isinstance(error, EngineLost)


def test_the_deadline_of_a_request_begins_when_it_has_a_slot() -> None:
    """One replica that takes one request at a time, 15 requests at once, a deadline of three: all
    are answered at the first try, also those that waited for longer than the deadline of one
    attempt and that of all attempts.
    """

    async def scenario():
        limits = FleetLimits(
            request_timeout_s=0.15, total_timeout_s=0.3, probe_every_s=0.05, probe_timeout_s=0.1
        )
        async with running([FakeEngine(delay=0.05, max_in_flight=1)], limits) as fleet:
            begin = now()
            answers = await asyncio.gather(*(fleet.generate(ask(i)) for i in range(15)))
            return answers, now() - begin, fleet.metrics()

    answers, seconds, metrics = run(scenario())
    assert [answer.token_ids[0] for answer in answers] == list(range(15))
    assert (
        seconds > 0.6 and metrics.retries == metrics.outages == 0 and not any(metrics.load.values())
    )


def test_requests_that_wait_for_a_slot_of_a_dying_replica_go_elsewhere() -> None:
    """Two replicas of one slot each; the first dies with half of the requests waiting for it. All
    are answered by the other, and only requests that had been sent count as retried. A cancelled
    one gives up its slot.
    """

    async def scenario():
        engines = [FakeEngine(i, delay=0.02, max_in_flight=1) for i in range(2)]
        async with running(
            engines, FleetLimits(request_timeout_s=60, probe_every_s=0.05, probe_timeout_s=0.1)
        ) as fleet:
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(2)))
            tasks = [asyncio.ensure_future(fleet.generate(ask(i))) for i in range(20)]
            await asyncio.sleep(0.03)
            engines[0].dead = True
            tasks[-1].cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            return answers, fleet.metrics()

    answers, metrics = run(scenario())
    assert [answer.token_ids[0] for answer in answers[:-1]] == list(range(19))
    assert isinstance(answers[-1], asyncio.CancelledError)
    assert 1 <= metrics.retries <= 3 and not any(metrics.load.values())


def test_a_request_for_many_tokens_has_more_time() -> None:
    """A quarter of a second for each token of four: a replica that needs half a second is waited
    for, where a deadline without tokens ends the request. One and all attempts grow alike.
    """
    limits = FleetLimits(request_timeout_s=0.1, total_timeout_s=0.6, token_timeout_s=0.25)
    assert limits.deadlines(4) == pytest.approx((1.1, 6.6)) and limits.deadlines(0) == (0.1, 0.6)

    async def scenario(limits):
        async with running([FakeEngine(delay=0.5)], limits) as fleet:
            return await fleet.generate(ask(7))

    assert run(scenario(limits)).token_ids[0] == 7
    with pytest.raises(EngineFailure, match=r"no answer within 0.1 s \(request_timeout_s\)"):
        run(scenario(FleetLimits(request_timeout_s=0.1, total_timeout_s=0.6)))


def test_an_invalid_request_fails_at_once_and_evicts_no_replica() -> None:
    """The engine's message, one attempt, no outage."""

    async def scenario():
        engines = [FakeEngine(i) for i in range(2)]
        async with running(engines) as fleet:
            with pytest.raises(EngineFailure, match="token id -1 is outside the vocabulary"):
                await fleet.generate(ask(-1))
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.retries == 0 and metrics.outages == 0 and metrics.failed == 1


def test_a_late_answer_is_dropped() -> None:
    """The first replica cannot be cancelled and answers after its attempt was abandoned: one result,
    one late answer.
    """

    class Stubborn(FakeEngine):
        async def generate(self, request):
            if self.number == 0:
                self.hung = True
                try:
                    await asyncio.sleep(10)
                except asyncio.CancelledError:
                    return Generation((9, 9, 9), (0.0,) * 3, (0,) * 3, FinishReason.STOP)
            return await super().generate(request)

    async def scenario():
        async with running([Stubborn(0), Stubborn(1)]) as fleet:
            answer = await fleet.generate(ask(5))
            await asyncio.sleep(0.05)
            return answer, fleet.metrics()

    answer, metrics = run(scenario())
    assert answer.token_ids == (5, 1) and metrics.answered == 1
    assert metrics.late_answers == 1 and metrics.lost_response_tokens == 3


def test_an_aborted_answer_is_retried() -> None:
    """A server that is shut down sends what it has with finish_reason=abort: no sample is cut short
    by that.
    """

    class Aborting(FakeEngine):
        async def generate(self, request):
            if not self.seen:
                self.seen.append(request.prompt_ids)
                return Generation((1, 2), (0.0, 0.0), (0, 0), FinishReason.ABORT)
            return await super().generate(request)

    async def scenario():
        async with running([Aborting(0)]) as fleet:
            return await fleet.generate(ask(5)), fleet.metrics()

    answer, metrics = run(scenario())
    assert answer.finish_reason is FinishReason.STOP and metrics.lost_response_tokens == 2


def test_without_a_replica_every_request_fails_in_bounded_time_and_says_why() -> None:
    """All waiting requests and every later one get ``EngineLost`` with each replica's last error
    and the wait.
    """

    async def scenario():
        engines = [FakeEngine(i) for i in range(3)]
        async with running(engines, name="verifier pool") as fleet:
            await fleet.generate(ask(1))
            for engine in engines:
                engine.dead = True
            begin = now()
            results = await generate_all(fleet, [ask(i) for i in range(50)])
            first, begin = now() - begin, now()
            with pytest.raises(EngineLost):
                await fleet.generate(ask(1))
            return results, first, now() - begin, await fleet.health()

    results, first, later, health = run(scenario())
    assert all(isinstance(result, EngineLost) for result in results) and not health.alive
    message = str(results[0])
    assert (
        "no server of the verifier pool is left: 3 of 3" in message
        and "this request waited" in message
    )
    assert (
        all(f"engine {i}: connection refused" in message for i in range(3)) and "\n" not in message
    )
    assert first < 3 and later < 0.2


def test_a_cancelled_caller_cancels_the_engines_call() -> None:
    """The load of the replica goes down."""

    async def scenario():
        engine = FakeEngine(0, delay=10)
        async with running([engine], limits=FleetLimits()) as fleet:
            work = asyncio.create_task(fleet.generate(ask(1)))
            await until(lambda: engine.running == 1)
            work.cancel()
            await asyncio.wait([work])
            await until(lambda: engine.running == 0)
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.cancelled == 1 and metrics.load == {"m0": 0}


def test_a_blocked_event_loop_is_not_a_failure() -> None:
    """A training step holds the loop for longer than every deadline; requests and probes in flight
    survive it.
    """

    async def scenario():
        engines = [FakeEngine(i, delay=0.05) for i in range(2)]
        async with running(engines) as fleet:
            work = [asyncio.create_task(fleet.generate(ask(i))) for i in range(10)]
            await until(lambda: sum(engine.running for engine in engines) == 10)
            block_event_loop(1.0)
            await asyncio.gather(*work)
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.retries == metrics.outages == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_failures_never_lose_or_double_a_request(seed: int) -> None:
    """Engines die, hang and return at random under 200 requests. Each ends in exactly one answer,
    its own; the counts add up. Proves nothing about real sockets: the tests with fake servers and
    real ones do that.
    """

    async def scenario():
        draw, stop = random.Random(seed), asyncio.Event()
        engines = [FakeEngine(i, delay=draw.uniform(0.001, 0.01)) for i in range(4)]
        limits = FleetLimits(
            request_timeout_s=0.2,
            total_timeout_s=30,
            max_attempts=60,
            backoff_s=0.002,
            max_backoff_s=0.05,
            probe_every_s=0.02,
            probe_timeout_s=0.05,
            pool_down_timeout_s=10,
        )
        async with running(engines, limits) as fleet:
            chaos = asyncio.create_task(trouble(engines, draw, stop))
            results = []
            for first in range(0, 200, 25):
                batch = [ask(i, i % 7) for i in range(first, first + 25)]
                results += await generate_all(fleet, batch)
            stop.set()
            await chaos
            return results, fleet.metrics()

    results, metrics = run(scenario())
    assert [result.token_ids[:2] for result in results] == [(i, i % 7) for i in range(200)]
    assert metrics.requests == metrics.answered == 200 and metrics.failed == 0
    assert not any(metrics.load.values())


@pytest.mark.parametrize("seed", range(4))
def test_random_failures_of_launched_servers_under_updates_keep_versions_straight(
    seed: int,
) -> None:
    """Servers are killed at random between and during updates and restart with the folder's
    weights; with a hook, no token is ever sampled from any version but the one that was current
    when its request began or ended.
    """

    async def scenario():
        draw = random.Random(seed)
        launchers = [FakeLauncher(i, max_restarts=1000, start_s=0.003) for i in range(3)]

        async def hook(engine, version):
            if draw.random() < 0.3:
                raise EngineUnavailable("the hook failed")
            await asyncio.sleep(0.001)
            engine.version = version

        wrong, done = 0, 0
        limits = FleetLimits(
            max_attempts=60,
            backoff_s=0.002,
            max_backoff_s=0.02,
            probe_every_s=0.02,
            probe_timeout_s=0.2,
            pool_down_timeout_s=5,
            control_timeout_s=1,
        )
        async with running(launchers, limits, on_return=hook) as fleet:
            for version in range(1, 12):
                with_some_up = lambda: fleet.metrics().replicas_up >= 1  # noqa: E731
                if version > 1:
                    await until(with_some_up)
                await fleet.pause()
                with contextlib.suppress(
                    EngineFailure
                ):  # all were dead at once: the old version stays current
                    await fleet.update_weights([("w", None)], version)
                await fleet.resume()
                work = [asyncio.create_task(fleet.generate(ask(i))) for i in range(30)]
                await asyncio.sleep(draw.uniform(0, 0.004))
                victim = draw.choice(launchers)
                if victim.engines:
                    victim.engine.dead = True
                for result in await asyncio.gather(*work, return_exceptions=True):
                    if isinstance(result, EngineLost):
                        continue  # all outdated: their hook failed
                    assert not isinstance(result, BaseException), result
                    done += 1
                    wrong += set(result.weight_versions) != {fleet.version}
        return wrong, done

    wrong, done = run(scenario())
    assert wrong == 0 and done > 200


def test_a_probe_that_a_blocked_event_loop_made_late_is_repeated() -> None:
    """A client with a deadline of its own sees it pass while a training step holds the loop: the
    server was sound.
    """

    class Watched(FakeEngine):
        asked = 0

        async def probe(self, timeout_s: float) -> None:
            self.asked += 1
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.sleep(0.03)
                    await super().probe(timeout_s)
            except TimeoutError as error:
                raise EngineUnavailable("the probe's token did not come") from error

    async def scenario():
        engine = Watched(0)
        async with running([engine]) as fleet:
            await fleet.generate(ask(1))
            for _ in range(3):
                seen = engine.asked
                await until(lambda: engine.asked > seen)  # noqa: B023 - one is on its way
                await asyncio.sleep(0.005)
                block_event_loop(0.4)
                await asyncio.sleep(0.02)
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.outages == 0 and metrics.replicas_up == 1


class Rejecting(FakeEngine):
    """Passes probes, and rejects as many generations as ``rejections`` says."""

    rejections = 0

    async def generate(self, request):
        if self.rejections > 0:
            self.rejections -= 1
            await asyncio.sleep(0.005)
            raise EngineUnavailable("503 for now")
        return await super().generate(request)


def test_a_burst_of_rejections_is_one_failure() -> None:
    """A server that is overloaded for a moment rejects 30 requests at once; killing it would cost
    minutes.
    """

    async def scenario():
        engine = Rejecting(0)
        async with running([engine]) as fleet:
            await fleet.generate(ask(0))
            engine.rejections = 30
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(30)))
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.retries == 30 and metrics.outages == 0


def test_a_moment_of_rejections_does_not_evict_the_only_server() -> None:
    """For half a second a launched server rejects every request and probe, and a queue of requests
    waits behind them: the server is not restarted, and every request is answered.
    """

    class Overloaded(FakeEngine):
        until = 0.0

        async def _alive(self) -> None:
            if now() < self.until:
                raise EngineUnavailable("503 for now")
            await super()._alive()

    async def scenario():
        engine = Overloaded(0, max_in_flight=4)
        launcher = FakeLauncher(engine_of=lambda: engine)
        async with running([launcher], FleetLimits(request_timeout_s=60)) as fleet:
            await fleet.generate(ask(0))
            engine.until = now() + 0.5
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(40)))
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.outages == 0 and metrics.answered == 41 and metrics.retries >= 40


def test_a_pause_between_two_probes_of_a_rejecting_server_does_not_evict_it() -> None:
    """A launched server rejects one request and one probe; before the probe is repeated, the fleet
    is paused, when the server answers no probe. After the pause it serves again.
    """

    class RejectsOnce(FakeEngine):
        rejections = 0

        async def probe(self, timeout_s: float) -> None:
            if self.paused:
                raise EngineFailure("a paused server answers no probe")
            if self.rejections:
                self.rejections -= 1
                raise EngineUnavailable("503 for now")

    async def scenario():
        engine = RejectsOnce(0)
        launcher = FakeLauncher(engine_of=lambda: engine)
        async with running([launcher], FleetLimits(probe_every_s=1.0)) as fleet:
            await fleet.generate(ask(0))
            engine.rejections = 1
            await until(lambda: not engine.rejections)
            await fleet.pause()
            await asyncio.sleep(5.0)
            await fleet.resume()
            await asyncio.sleep(5.0)
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.outages == 0 and metrics.replicas_up == 1


def test_a_server_that_serves_no_request_is_evicted_though_it_passes_probes() -> None:
    """Three requests, each sent after the last one failed. It is let in again once it answers a
    probe, and so on with growing pauses; every request is answered by the other one.
    """

    async def scenario():
        engines = [Rejecting(0), FakeEngine(1)]
        engines[0].rejections = 10**6
        async with running(engines) as fleet:
            await fleet.health()
            await until(lambda: fleet.metrics().replicas_up == 2)
            for i in range(12):
                await fleet.generate(ask(i))
                await asyncio.sleep(0.01)
            return fleet.metrics()

    metrics = run(scenario())
    assert metrics.outages >= 1 and metrics.answered == 12
