"""The traps of docs/engines.md, as a client meets them: the fake behaves as the real server was
seen to.
"""

import asyncio

import numpy as np
import pytest
from engine_cases import ask
from fake_sglang import FakeSglang
from test_sglang_server import client, paths, until, with_fake

from spark_nemo.engines import EngineFailure, EngineUnavailable
from spark_nemo.engines.sglang import PauseMode, SglangServer

BUCKET = {"names": ["a"], "dtypes": ["float32"], "shapes": [(2,)], "group_name": "g"}


async def running(server, fake, tokens=0, **sampling):
    """A request that the fake is generating, a token every 5 ms, once it has ``tokens`` of them."""
    fake.faults.token_s = 0.005
    task = asyncio.create_task(server.generate(ask((1,), **sampling)))
    await until(lambda: fake.running and len(next(iter(fake.running.values())).tokens) >= tokens)
    return task


def test_1_updates_outside_a_session_are_rejected_at_once():
    """The rejection comes back as an error while a broadcast would hang; inside a session the same
    calls succeed.
    """

    async def scenario(server, fake):
        for update in (
            server.update_weights_from_distributed(**BUCKET),
            server.update_weights_from_tensor(["aGk="]),
        ):
            with pytest.raises(EngineFailure, match="must run between begin_weight_update"):
                await asyncio.wait_for(update, 2)
        await server.begin_weight_update()
        with pytest.raises(EngineFailure, match="already open"):
            await server.begin_weight_update()
        with pytest.raises(EngineFailure, match="Group g not in"):
            await server.update_weights_from_distributed(**BUCKET)
        await server.init_weights_update_group(
            master_address="127.0.0.1",
            master_port=1,
            rank_offset=1,
            world_size=2,
            group_name="g",
            backend="gloo",
        )
        await server.update_weights_from_distributed(**BUCKET, version=4)
        await server.update_weights_from_tensor(["aGk="], version=5)
        await server.end_weight_update()
        await server.destroy_weights_update_group("g")
        assert await server.weight_version() == 5
        with pytest.raises(EngineFailure, match="no weight-update session"):
            await server.end_weight_update()

    with_fake(scenario)


def test_1_server_that_never_answers_an_update_is_unavailable():
    """Joining a group waits for every rank; the caller gets its own time limit, not the control
    calls'.
    """

    async def scenario(server, fake):
        start = asyncio.get_running_loop().time()
        with pytest.raises(EngineUnavailable, match=r"no answer within 0\.2 s"):
            await server.init_weights_update_group(
                master_address="127.0.0.1",
                master_port=1,
                rank_offset=1,
                world_size=2,
                group_name="late",
                backend="gloo",
                timeout_s=0.2,
            )
        assert asyncio.get_running_loop().time() - start < 2

    class Slow(FakeSglang):
        async def init_weights_update_group(self, request):
            await asyncio.sleep(60)

    with_fake(scenario, fake=Slow())


@pytest.mark.parametrize("prompt", [(1, 64), (1, -1)])
def test_3_ids_outside_the_vocabulary_never_reach_the_server(prompt):
    """The fake dies of them, as the real one does; the client rejects them."""

    async def scenario(server, fake):
        with pytest.raises(EngineFailure, match="outside the vocabulary of 64"):
            await server.generate(ask(prompt))
        assert paths(fake) == []
        bold = SglangServer(
            fake.url,
            api_key=None,
            vocab_size=1000,
            max_context=100,
            max_in_flight=1,
            request_timeout_s=5,
            control_timeout_s=1,
        )
        with pytest.raises(EngineUnavailable if prompt[1] > 0 else EngineFailure):
            await bold.generate(ask(prompt))
        await bold.close()
        assert fake.dead == (prompt[1] > 0)

    with_fake(scenario)


def test_4_logprobs_are_after_temperature():
    """At T=0.5 they differ from those of the same tokens at T=1; greedy reports T=1's."""

    async def scenario(server, fake):
        greedy = await server.generate(ask((1,), temperature=0.0, max_new_tokens=1))
        sharp = [
            await server.generate(ask((1,), temperature=0.5, max_new_tokens=1)) for _ in range(20)
        ]
        same = [g.logprobs[0] for g in sharp if g.token_ids == greedy.token_ids]
        assert same and np.ptp(same) == 0 and same[0] > greedy.logprobs[0] + 0.1

    with_fake(scenario)


def test_5_seed_is_sent():
    """It has no effect without deterministic inference, which only the real server could show; it
    is in the body.
    """

    async def scenario(server, fake):
        await server.generate(ask((1,), seed=7))
        assert fake.calls[0][1]["sampling_params"]["sampling_seed"] == 7

    with_fake(scenario)


def test_6_health_is_503_during_a_pause_and_the_client_does_not_ask_it():
    """alive and paused, at once; a probe fails instead of waiting for the end of the pause."""

    async def scenario(server, fake):
        await server.pause()
        health = await asyncio.wait_for(server.health(), 2)
        assert (health.alive, health.paused) == (True, True) and "/health" not in paths(fake)
        with pytest.raises(EngineFailure, match="paused"):
            await server.probe(1.0)
        await server.resume()
        health = await server.health()
        assert (health.alive, health.paused) == (True, False) and "/health" in paths(fake)

    with_fake(scenario, fake=FakeSglang(health_wait_s=30))


@pytest.mark.parametrize("mode", [None, PauseMode.IN_PLACE])
def test_7_update_that_would_kill_or_block_is_rejected(mode, tmp_path):
    """0.5.21 asserts that the flush succeeded, which requests paused in place prevent; not paused,
    it would wait for them. Without a flush the paused update goes through, and the tokens carry
    both versions.
    """
    (tmp_path / "config.json").touch()

    async def scenario(server, fake):
        task = await running(server, fake, tokens=4, max_new_tokens=30)
        if mode is not None:
            await server.pause(mode)
        with pytest.raises(
            EngineFailure, match="flush_cache=True with 1 requests running kills the server"
        ):
            await server.update_weights_from_disk(tmp_path, 1)
        with pytest.raises(EngineFailure, match="releasing memory with 1 requests running"):
            await server.release_memory_occupation()
        await server.pause(PauseMode.IN_PLACE)
        await server.update_weights_from_disk(tmp_path, 1, flush_cache=False)
        await server.resume()
        assert set((await task).weight_versions) == {0, 1} and not fake.dead and fake.flushes == 0

    with_fake(scenario)


def test_7_retracted_requests_survive_an_update_with_flush(tmp_path):
    """The default pause: cache dropped, weights replaced, nothing lost, every token knows its
    weights.
    """
    (tmp_path / "config.json").touch()

    async def scenario(server, fake):
        task = await running(server, fake, tokens=4, max_new_tokens=30)
        await server.pause()
        await server.update_weights_from_disk(tmp_path, 1)
        await server.resume()
        result = await task
        assert sorted(result.weight_versions) == list(result.weight_versions) and set(
            result.weight_versions
        ) == {0, 1}
        assert (
            len(result.token_ids) == 30
            and fake.flushes == 1
            and (await server.health()).weight_version == 1
        )

    with_fake(scenario)


def test_abort_pause_makes_requests_redoable():
    """Mode abort ends them with HTTP 200 and what they have: EngineUnavailable, so that a fleet
    redoes them whole.
    """

    async def scenario(server, fake):
        task = await running(server, fake, max_new_tokens=30)
        await server.pause(PauseMode.ABORT)
        with pytest.raises(EngineUnavailable, match="aborted the request"):
            await task
        await server.resume()

    with_fake(scenario)


def test_9_context_is_smaller_than_it_says():
    """SGLang serves a context of 128 in full up to 122 tokens and then samples fewer: check_limits
    rejects such a client, and a reply that is too short fails as well.
    """

    async def scenario(server, fake):
        await server.check_limits()
        assert len((await server.generate(ask((3,) * 100, max_new_tokens=22))).token_ids) == 22
        with pytest.raises(EngineFailure, match=r"123, over the context of 122"):
            await server.generate(ask((3,) * 100, max_new_tokens=23))
        wide = SglangServer(
            fake.url,
            api_key=None,
            vocab_size=64,
            max_context=128,
            max_in_flight=1,
            request_timeout_s=5,
            control_timeout_s=1,
        )
        with pytest.raises(EngineFailure, match="max_context=128 is over the 122 tokens"):
            await wide.check_limits()
        with pytest.raises(EngineFailure, match="26 of max_new_tokens=28"):
            await wide.generate(ask((3,) * 100, max_new_tokens=28))
        await wide.close()

    with_fake(scenario)


def test_rejected_control_calls_carry_the_servers_message(tmp_path):
    """A missing folder and the checksum that 0.5.21 cannot do without CUDA."""

    async def scenario(server, fake):
        with pytest.raises(
            EngineFailure, match="update_weights_from_disk: 400 Failed to get weights iterator"
        ):
            await server.update_weights_from_disk(tmp_path, 1)
        with pytest.raises(EngineFailure, match="not compiled with CUDA"):
            await server.weights_checksum()
        with pytest.raises(EngineFailure, match="use a transport of weight_sync"):
            await server.update_weights([], 1)

    with_fake(scenario)


def test_naming_weights_aborts_nothing():
    """SGLang's default would abort every request; ours does not."""

    async def scenario(server, fake):
        task = await running(server, fake, tokens=1)
        await server.update_weight_version(9)
        assert set((await task).weight_versions) == {0, 9}

    with_fake(scenario)


def test_7_update_waits_for_running_requests_when_not_paused(tmp_path):
    """Without a pause an update begins when the last running request has ended: it stamps none of
    their tokens.
    """
    (tmp_path / "config.json").touch()

    async def scenario(server, fake):
        task = await running(server, fake)
        await server.update_weights_from_disk(tmp_path, 1, flush_cache=False)
        assert set((await task).weight_versions) == {0}

    with_fake(scenario)


def test_death_of_the_server_ends_everything_in_flight(tmp_path):
    """Requests held in an in-place pause do not wait for a server that another client's update
    has killed.
    """
    (tmp_path / "config.json").touch()

    async def scenario(server, fake):
        task = await running(server, fake, max_new_tokens=30)
        stranger = client(fake.url)
        await stranger.pause(PauseMode.IN_PLACE)
        with pytest.raises(EngineUnavailable):
            await stranger.update_weights_from_disk(tmp_path, 1)
        with pytest.raises(EngineUnavailable):
            await task
        await stranger.close()

    with_fake(scenario)
