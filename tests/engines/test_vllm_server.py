"""The vLLM client against a fake of its protocol; tests/real_vllm compares the same client with the
real server.
"""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest
from fake_vllm import CONTEXT, KEY, NAME, VOCAB, FakeVllm, logprobs_after

from spark_nemo.engines import (
    EngineFailure,
    EngineUnavailable,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from spark_nemo.engines.vllm import VllmServer, server_command, server_environment


def ask(*prompt: int, **sampling) -> GenerationRequest:
    return GenerationRequest(
        prompt or (1, 2), SamplingParams(**{"max_new_tokens": 4, "temperature": 0.0, **sampling})
    )


def client(url: str, **settings) -> VllmServer:
    return VllmServer(
        url,
        **{
            "api_key": KEY,
            "served_name": NAME,
            "vocab_size": VOCAB,
            "max_context": CONTEXT,
            "max_in_flight": 8,
            "request_timeout_s": 5.0,
            "control_timeout_s": 5.0,
            **settings,
        },
    )


def with_server(scenario, fake: FakeVllm | None = None, **settings):
    """Run ``scenario(fake, engine)`` while the fake serves."""

    async def run():
        server = fake or FakeVllm()
        async with server.serve() as url:
            engine = client(url, **settings)
            try:
                return await scenario(server, engine)
            finally:
                await engine.close()

    return asyncio.run(run())


def test_ids_go_in_and_out_with_the_sampled_tokens_logprobs() -> None:
    """Ids, log-probabilities after temperature and versions, one each; a stop token ends and is
    part of the answer.
    """

    async def scenario(fake, engine):
        full = await engine.generate(ask(temperature=0.5, seed=7))
        stopped = await engine.generate(ask(stop_token_ids=(full.token_ids[2],)))
        return full, stopped, fake.bodies

    full, stopped, bodies = with_server(scenario, weight_version=3)
    context = (2, *full.token_ids)
    assert full.logprobs == pytest.approx(
        [logprobs_after(a, 0.5)[b] for a, b in itertools.pairwise(context)]
    )
    assert full.weight_versions == (3,) * 4 and full.finish_reason is FinishReason.LENGTH
    assert stopped.token_ids == full.token_ids[:3] and stopped.finish_reason is FinishReason.STOP
    assert bodies[0]["prompt"] == [1, 2] and bodies[0]["seed"] == 7 and "seed" not in bodies[1]


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 3}])
def test_under_a_cut_there_are_no_logprobs_rather_than_other_ones(cut: dict) -> None:
    """vLLM would give those of the cut distribution: NaN instead. A greedy request is not cut."""

    async def scenario(fake, engine):
        sampled, greedy = [await engine.generate(ask(temperature=t, **cut)) for t in (0.7, 0.0)]
        assert all(map(math.isnan, sampled.logprobs)) and not any(map(math.isnan, greedy.logprobs))
        assert (
            "logprobs" not in fake.bodies[0]
            and fake.bodies[1]["top_p"] == 1.0
            and fake.bodies[1]["top_k"] == 0
        )

    with_server(scenario)


@pytest.mark.parametrize(
    "request_",
    [
        ask(max_new_tokens=CONTEXT),
        ask(VOCAB),
        ask(-1),
        ask(stop_token_ids=(VOCAB,)),
        ask(temperature=0.001),
        GenerationRequest((), SamplingParams(max_new_tokens=1)),
    ],
    ids=[
        "too long",
        "above the vocabulary",
        "negative",
        "stop token",
        "colder than vLLM samples",
        "empty",
    ],
)
def test_what_would_be_rejected_or_changed_is_not_sent(request_: GenerationRequest) -> None:
    """Also a temperature that vLLM raises without telling."""

    async def scenario(fake, engine):
        with pytest.raises(EngineFailure) as error:
            await engine.generate(request_)
        assert not isinstance(error.value, EngineUnavailable) and not fake.bodies

    with_server(scenario)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("choices", {"choices": []}),
        ("prompt_token_ids", {"prompt_token_ids": [1]}),
        ("token_ids", {"token_ids": None}),
        ("one entry for each", {"token_ids": [1, 2, 3, 4]}),
        ("finish_reason", {"finish_reason": "repetition"}),
        ("max-model-len", {"token_ids": [1]}),
        ("stop token", {"finish_reason": "stop", "stop_reason": 5}),
    ],
)
def test_a_reply_that_does_not_answer_the_request_is_rejected(named: str, change: dict) -> None:
    """Above all ids that are not those the log-probabilities belong to; the message names the
    field.
    """

    def changed(reply: dict) -> dict:
        return change if "choices" in change else {"choices": [{**reply["choices"][0], **change}]}

    async def scenario(fake, engine):
        fake.change = changed
        with pytest.raises(EngineFailure, match=named) as error:
            await engine.generate(ask())
        assert not isinstance(error.value, EngineUnavailable)

    with_server(scenario)


def test_an_aborted_request_could_be_served_elsewhere() -> None:
    """HTTP 200 with finish_reason abort is not a generation."""

    async def scenario(fake, engine):
        fake.change = lambda reply: {"choices": [{**reply["choices"][0], "finish_reason": "abort"}]}
        with pytest.raises(EngineUnavailable, match="aborted"):
            await engine.generate(ask())

    with_server(scenario)


@pytest.mark.parametrize(
    ("status", "error"), [(503, EngineUnavailable), (500, EngineUnavailable), (400, EngineFailure)]
)
def test_a_failed_request_is_sent_once(status: int, error: type[EngineFailure]) -> None:
    """Another server could serve it after a 5xx, which a fleet decides; none could after a 400."""

    async def scenario(fake, engine):
        fake.statuses = [status]
        with pytest.raises(EngineFailure) as raised:
            await engine.generate(ask())
        assert type(raised.value) is error
        assert len(fake.bodies) == 1

    with_server(scenario)


def test_a_wrong_key_is_reported_without_showing_the_key() -> None:
    """The commonest mistake of a server given by URL."""

    async def scenario(fake, engine):
        with pytest.raises(EngineFailure, match="401") as error:
            await engine.generate(ask())
        assert "wrong-key" not in str(error.value)

    with_server(scenario, api_key="wrong-key")


def test_a_dead_server_is_unavailable_and_not_alive() -> None:
    """Nothing listens: the class that lets a fleet serve the request elsewhere."""

    async def scenario():
        engine = client("http://127.0.0.1:9")
        with pytest.raises(EngineUnavailable):
            await engine.generate(ask())
        assert not (await engine.health()).alive
        await engine.close()

    asyncio.run(scenario())


def test_a_late_request_ends_at_the_server_too() -> None:
    """The deadline closes the connection, on which vLLM aborts, as the real test proves."""

    async def scenario(fake, engine):
        fake.delay_s = 30.0
        with pytest.raises(EngineUnavailable, match=r"within 0\.05 s"):
            await engine.generate(ask())
        await asyncio.sleep(0.05)
        assert fake.cancelled == 1 and fake.running == 0

    with_server(scenario, request_timeout_s=0.05)


def test_cancelling_and_closing_reach_the_server() -> None:
    """A cancelled caller's request and, on close, everything else; a closed client fails."""

    async def scenario(fake, engine):
        fake.delay_s = 30.0
        tasks = [asyncio.create_task(engine.generate(ask())) for _ in range(3)]
        await asyncio.sleep(0.1)
        tasks[0].cancel()
        await asyncio.sleep(0.05)
        assert fake.cancelled == 1
        await engine.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [
            asyncio.CancelledError,
            EngineUnavailable,
            EngineUnavailable,
        ]
        await asyncio.sleep(0.05)
        assert fake.cancelled == 3
        with pytest.raises(EngineUnavailable, match="closed"):
            await engine.generate(ask())

    with_server(scenario)


def test_requests_in_flight_are_bounded() -> None:
    """Twenty callers, four connections at most; every one is served."""

    async def scenario(fake, engine):
        fake.delay_s = 0.01
        await asyncio.gather(*(engine.generate(ask()) for _ in range(20)))
        assert fake.most == 4 and (await engine.health()).tokens_generated == 80

    with_server(scenario, max_in_flight=4)


def test_health_and_probe_tell_a_sick_server() -> None:
    """/health for liveness, one real token for the rest."""

    async def scenario(fake, engine):
        await engine.probe(1.0)
        fake.healthy, fake.delay_s = False, 30.0
        assert not (await engine.health()).alive
        with pytest.raises(EngineUnavailable, match="probe"):
            await engine.probe(0.05)

    with_server(scenario)


def test_a_probe_does_not_wait_behind_generations() -> None:
    """With every connection taken by slow requests the probe still gets out: a busy server is not a
    hung one.
    """

    async def scenario(fake, engine):
        fake.delay_s = 0.6
        busy = [asyncio.create_task(engine.generate(ask())) for _ in range(4)]
        await asyncio.sleep(0.2)
        fake.delay_s = 0.0
        await engine.probe(0.3)
        assert not any(task.done() for task in busy)
        await asyncio.gather(*busy)

    with_server(scenario, max_in_flight=1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_context": CONTEXT + 1}, "max-model-len"),
        ({"served_name": "other"}, "served-model-name"),
    ],
)
def test_a_server_that_is_not_the_one_expected_is_rejected_at_start(
    settings: dict, named: str
) -> None:
    """A shorter context would cut responses; another name is another model."""

    async def scenario(fake, engine):
        with pytest.raises(EngineFailure, match=named):
            await engine.check_limits()

    with_server(scenario, **settings)


@pytest.mark.parametrize("processed", [True, False])
def test_the_logprobs_mode_of_a_server_is_found_out(processed: bool) -> None:
    """A server given by URL may run in vLLM's default mode, before temperature: it fails with the
    flag to set.
    """

    async def scenario(fake, engine):
        await engine.check_limits()
        if processed:
            await engine.check_logprobs_mode()
        else:
            with pytest.raises(EngineFailure, match="processed_logprobs"):
                await engine.check_logprobs_mode()

    with_server(scenario, FakeVllm(processed))


def test_weights_and_pauses_are_rejected() -> None:
    """A trainer must not believe that its weights arrived, nor that sampling stopped."""

    async def scenario(fake, engine):
        for call in (engine.update_weights([], 1), engine.pause()):
            with pytest.raises(EngineFailure):
                await call

    with_server(scenario)


def test_the_key_is_in_the_environment_and_not_on_the_command_line() -> None:
    """A list of processes must not show it."""
    line = server_command(
        "python", "/m", port=1, served_name=NAME, max_context=64, max_batch_size=2
    )
    assert server_environment({"A": "b"}, KEY)["VLLM_API_KEY"] == KEY and KEY not in " ".join(line)
    assert line[line.index("--logprobs-mode") + 1] == "processed_logprobs"
