"""Calls that kill a real server, which is why the client rejects them. Each takes a server
of its own.
"""

import asyncio

import aiohttp
import pytest
from fake_sglang import FakeSglang
from real_server import real_server

LONG = {
    "input_ids": [1, 2, 3],
    "sampling_params": {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True},
}


async def outside_the_vocabulary(session, url, model):
    """Ids of the padding (691 to 703) are served as if they existed; beyond it the lookup fails."""
    async with session.post(f"{url}/generate", json={**LONG, "input_ids": [1, 70_000]}) as response:
        await response.read()


async def flush_with_requests_paused_in_place(session, url, model):
    """The update itself succeeds; the flush after it is asserted and cannot."""

    async def post(path, body):
        async with session.post(f"{url}{path}", json=body) as response:
            await response.read()

    async def update():
        await asyncio.sleep(0.3)
        await post("/pause_generation", {"mode": "in_place"})
        await post("/update_weights_from_disk", {"model_path": str(model)})
        await post("/continue_generation", {})

    results = await asyncio.gather(post("/generate", LONG), update(), return_exceptions=True)
    for result in results:
        if result is not None:
            raise result


async def survives(url, model, call):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        try:
            async with asyncio.timeout(60):
                await call(session, url, model)
            async with session.get(f"{url}/model_info") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@pytest.mark.parametrize("call", [outside_the_vocabulary, flush_with_requests_paused_in_place])
def test_real_and_fake_die_alike(call, model_folder, tmp_path):
    """Afterwards nothing listens there. If this fails on a newer SGLang, the client may allow
    more.
    """

    async def fake():
        async with FakeSglang(vocab_size=691, context=512) as server:
            server.faults.token_s = 0.01
            return await survives(server.url, model_folder, call)

    assert asyncio.run(fake()) is False
    with real_server(model_folder, tmp_path / "server.log") as server:
        assert asyncio.run(survives(server.url, model_folder, call)) is False
