"""The client of one SGLang server against the fake: serving, bounds, deadlines, cancelling,
retries, the API key.

The fake is compared with a real server in tests/real_sglang; what is proven here holds as far as
that comparison goes.
"""

import asyncio
import logging
import time

import numpy as np
import pytest
from engine_cases import ask, generate_all
from fake_sglang import FakeSglang

from spark_nemo.engines import EngineFailure, EngineUnavailable, FinishReason
from spark_nemo.engines.sglang import SglangServer

KEY = "key-that-nobody-may-see"


def client(url, **changes):
    options = {
        "api_key": None,
        "vocab_size": 64,
        "max_context": 122,
        "max_in_flight": 64,
        "request_timeout_s": 20.0,
        "control_timeout_s": 5.0,
        **changes,
    }
    return SglangServer(url, **options)


def with_fake(scenario, *, fake=None, **changes):
    """Run ``scenario(server, fake)`` against a fake in this process."""

    async def run():
        async with fake or FakeSglang() as running:
            server = client(running.url, **changes)
            try:
                return await asyncio.wait_for(scenario(server, running), 20)
            finally:
                await server.close()

    return asyncio.run(run())


def paths(fake):
    return [path for path, _ in fake.calls]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


def test_generation_is_what_the_server_sampled():
    """Greedy tokens are repeatable and have finite log-probabilities of the served version; LENGTH
    when all came.
    """

    async def scenario(server, fake):
        first, again = await generate_all(server, [ask((1, 5), temperature=0.0)] * 2)
        assert (
            first == again
            and len(first.token_ids) == 20
            and first.finish_reason is FinishReason.LENGTH
        )
        assert first.weight_versions == (3,) * 20 and np.isfinite(first.logprobs).all()
        assert (await server.health()).tokens_generated == 40

    with_fake(scenario, fake=FakeSglang(version="3"))


def test_stop_token_is_the_last_and_only_requested_ones_stop():
    """Every token is a stop token, so one comes; without stop tokens the model's own end token is
    passed over.
    """

    async def scenario(server, fake):
        stopped = await server.generate(ask((1, 5), stop_token_ids=tuple(range(64))))
        assert len(stopped.token_ids) == 1 and stopped.finish_reason is FinishReason.STOP
        fake.eos_id = (await server.generate(ask((1, 5), temperature=0.0))).token_ids[3]
        assert len((await server.generate(ask((1, 5), temperature=0.0))).token_ids) == 20

    with_fake(scenario)


def test_requests_in_flight_are_bounded():
    """40 callers, 5 connections: the server never sees more than 5 requests at once."""

    async def scenario(server, fake):
        fake.faults.token_s = 0.002
        results = await generate_all(server, [ask((n + 1,)) for n in range(40)])
        assert all(len(result.token_ids) == 20 for result in results)
        assert fake.most_running == 5

    with_fake(scenario, max_in_flight=5)


def test_cancelled_caller_aborts_on_the_server():
    """The abort names our request id, and the server is idle at once; other requests go on."""

    async def scenario(server, fake):
        fake.faults.token_s = 0.01
        cancelled, other = (asyncio.create_task(server.generate(ask((n,)))) for n in (1, 2))
        await until(lambda: len(fake.running) == 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        (body,) = [body for path, body in fake.calls if path == "/abort_request"]
        assert body["rid"] == fake.calls[0][1]["rid"] and len((await other).token_ids) == 20

    with_fake(scenario)


def test_deadline_aborts_and_says_unavailable():
    """A generation that does not come is asked to stop and can be served elsewhere; the client
    stays usable.
    """

    async def scenario(server, fake):
        fake.faults.hang = True
        with pytest.raises(EngineUnavailable, match=r"no answer within 0\.2 s"):
            await server.generate(ask((1,)))
        assert "/abort_request" in paths(fake)
        fake.faults.hang = False
        await server.generate(ask((1,)))

    with_fake(scenario, request_timeout_s=0.2)


def test_a_paused_client_holds_new_requests():
    """A running request keeps its tokens over the pause; a new one is sent after it."""

    async def scenario(server, fake):
        fake.faults.token_s = 0.005
        task = asyncio.create_task(server.generate(ask((1,))))
        await until(lambda: fake.running and next(iter(fake.running.values())).tokens)
        await server.pause()
        held = asyncio.create_task(server.generate(ask((2,))))
        await asyncio.sleep(0.2)
        health = await server.health()
        assert (health.running, health.waiting) == (1, 1)
        assert not task.done() and paths(fake).count("/generate") == 1
        await server.resume()
        assert len((await task).token_ids) == len((await held).token_ids) == 20

    with_fake(scenario)


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"drop": 1}, "ConnectionLost|Disconnected|disconnected"),
        ({"fail": 1, "fail_status": 503}, "503"),
        ({"fail": 1, "fail_status": 500}, "500"),
        ({"abort": 1}, "aborted the request: Aborted"),
    ],
    ids=["lost", "503", "500", "abort"],
)
def test_failures_of_the_server_are_unavailable(fault, message):
    """One attempt, then EngineUnavailable: retries are the fleet's. A next request has a new id."""

    async def scenario(server, fake):
        for name, value in fault.items():
            setattr(fake.faults, name, value)
        with pytest.raises(EngineUnavailable, match=message):
            await server.generate(ask((1,)))
        assert len((await server.generate(ask((1,)))).token_ids) == 20
        rids = [body["rid"] for path, body in fake.calls if path == "/generate"]
        assert len(rids) == len(set(rids)) == 2
        assert (await server.health()).tokens_generated == 20

    with_fake(scenario)


def test_abort_that_blames_the_request_is_a_plain_failure():
    """No other server would do better: the request must not be retried."""

    async def scenario(server, fake):
        fake.faults.abort, fake.faults.abort_status = 1, 400
        with pytest.raises(EngineFailure, match="400") as caught:
            await server.generate(ask((1,)))
        assert not isinstance(caught.value, EngineUnavailable)

    with_fake(scenario)


def test_malformed_reply_is_a_failure_that_names_server_and_field():
    """A wrong server is not retried and gives no score."""

    async def scenario(server, fake):
        fake.edit_reply = lambda reply: {**reply, "output_ids": None}
        with pytest.raises(EngineFailure, match=f"{fake.url}/generate: output_ids: expected"):
            await server.generate(ask((1,)))
        fake.edit_reply = lambda reply: "<html>"
        with pytest.raises(EngineFailure, match="reply: expected an object, got str"):
            await server.generate(ask((1,)))

    with_fake(scenario)


def test_key_is_sent_but_never_shown(caplog):
    """In the header of every call; not in URLs, errors, logs, reprs or server_info, even if the
    server repeats it.
    """

    async def scenario(server, fake):
        caplog.set_level(logging.DEBUG)
        await server.generate(ask((1,)))
        await server.pause()
        await server.resume()
        fake.faults.drop, texts = (
            9,
            [repr(server), repr(await server.server_info()), repr(vars(server))],
        )
        with pytest.raises(EngineUnavailable) as caught:
            await server.generate(ask((1,)))
        texts.append(f"{caught.value!r} {caught.value.__cause__!r}")
        fake.faults.drop, fake.edit_reply = 0, lambda reply: {"error": {"message": f"no {KEY}"}}
        with pytest.raises(EngineFailure) as caught:
            await server.generate(ask((1,)))
        texts.append(str(caught.value))
        assert set(fake.authorizations) == {f"Bearer {KEY}"}
        assert KEY not in "".join([caplog.text, *texts])

    with_fake(scenario, fake=FakeSglang(api_key=KEY), api_key=KEY)


def test_a_wrong_key_is_reported():
    """A 401 does not lead to a retry elsewhere."""

    async def scenario(server, fake):
        with pytest.raises(EngineFailure, match="401: the server expects another API key"):
            await server.generate(ask((1,)))

    with_fake(scenario, fake=FakeSglang(api_key="other"), api_key=KEY)


@pytest.mark.parametrize(
    "url", ["http://me:secret@host:1", "host:1", "http://host:1/v1", "ftp://host"]
)
def test_bad_urls_are_rejected_without_showing_a_password(url):
    """Only http://host:port; credentials in a URL would end up in logs."""
    with pytest.raises(ValueError, match="server url") as caught:
        client(url)
    assert "secret" not in str(caught.value)


def test_close_ends_what_is_in_flight_and_leaves_the_server():
    """All callers get EngineUnavailable and the server their aborts; closing twice is fine."""

    async def scenario(server, fake):
        fake.faults.hang = True
        tasks = [asyncio.create_task(server.generate(ask((1,)))) for _ in range(4)]
        await until(lambda: len(fake.running) == 2)
        await server.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            isinstance(result, EngineUnavailable) and "closed" in str(result) for result in results
        )
        assert paths(fake).count("/abort_request") >= 2
        await server.close()
        assert not (await server.health()).alive

    with_fake(scenario, max_in_flight=2)


def test_probe_fails_of_a_wrong_key_on_a_healthy_server():
    """``/health`` wants no key, so it proves nothing of a server that rejects every request."""

    async def scenario(server, fake):
        with pytest.raises(EngineFailure, match="another API key"):
            await server.probe(1.0)

    with_fake(scenario, fake=FakeSglang(api_key=KEY), api_key="another")


def test_probe_passes_a_server_full_of_other_peoples_requests():
    """Behind a router, or shared by two runs, a server is full and this client has nothing there: a
    token of its own would wait in the server's queue for minutes, and a sound server would be
    killed as hung. That SGLang's ``/health`` is 200 then, and asks the scheduler when nothing runs,
    is read from its http_server.py and not proven here.
    """

    async def scenario(server, fake):
        fake.faults.token_s = 30.0
        await server.probe(1.0)

    with_fake(scenario)


def test_probe_passes_a_full_client():
    """Every slot is taken by long work and the probe still gets its token; a hung scheduler does
    not give one.
    """

    async def scenario(server, fake):
        fake.faults.token_s = 0.02
        task = asyncio.create_task(server.generate(ask((1,), max_new_tokens=100)))
        await until(lambda: fake.running)
        start = time.monotonic()
        await server.probe(2.0)
        assert time.monotonic() - start < 1.0 and not task.done()
        fake.faults.hang = True
        with pytest.raises(EngineUnavailable, match="probe"):
            await server.probe(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with_fake(scenario, max_in_flight=1)
