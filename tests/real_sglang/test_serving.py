"""A real SGLang server on a CPU against the embedded engine and the engine contract.

sgl_kernel's KV bookkeeping is a stand-in of ours there (tests/sglang_env); scheduler, cache,
sampler, model and HTTP layer are SGLang's. Nothing here says anything about a GPU.
"""

import asyncio

import pytest
import torch
from engine_cases import generate_all
from transformers import AutoModelForCausalLM

from spark_nemo.engines import (
    EngineFailure,
    EngineUnavailable,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Tokenizer,
)
from spark_nemo.engines.local import LocalEngine
from spark_nemo.engines.sglang import PauseMode, SglangServer
from spark_nemo.toy.problem_files import split_problems

CONTEXT = 506
"""Longest request that a server with a context of 512 serves in full."""


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """120 prompts of the toy task."""
    return [
        tokenizer.encode_chat([{"role": "user", "content": problem.question}])
        for problem in split_problems("eval", 120, 0)
    ]


@pytest.fixture(scope="session")
def local(model_folder):
    return LocalEngine.from_folder(model_folder, max_batch_size=64, max_context=CONTEXT)


def on_server(real, scenario, **changes):
    """Run ``scenario(server)`` with a client of its own and give its result back."""
    options = {
        "api_key": None,
        "vocab_size": 691,
        "max_context": CONTEXT,
        "max_in_flight": 64,
        "request_timeout_s": 120.0,
        "control_timeout_s": 60.0,
        **changes,
    }

    async def run():
        server = SglangServer(real.url, **options)
        try:
            return await scenario(server)
        finally:
            await server.close()

    return asyncio.run(run())


def requests_of(prompts, tokenizer, **sampling):
    params = SamplingParams(
        **{"max_new_tokens": 60, "stop_token_ids": tokenizer.eos_ids, **sampling}
    )
    return [GenerationRequest(prompt, params) for prompt in prompts]


def served(results):
    assert not [result for result in results if isinstance(result, EngineFailure)]
    return results


def scores(folder, prompt, response, temperature):
    """Log-probabilities of ``response`` by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return (
        torch.log_softmax(logits_TV / temperature, -1)
        .gather(1, torch.tensor(response)[:, None])
        .squeeze(1)
    )


def long_request(tokenizer, prompts, tokens=400):
    """Nothing stops it early."""
    return GenerationRequest(prompts[0], SamplingParams(max_new_tokens=tokens, temperature=0.0))


def test_greedy_completions_equal_the_embedded_engines(real, local, prompts, tokenizer):
    """120 prompts at once: same tokens, same finish reasons, log-probabilities within 1e-3."""
    requests = requests_of(prompts, tokenizer, temperature=0.0)
    theirs = served(on_server(real, lambda server: generate_all(server, requests)))
    ours = served(asyncio.run(generate_all(local, requests)))
    assert [g.token_ids for g in theirs] == [g.token_ids for g in ours]
    assert [g.finish_reason for g in theirs] == [g.finish_reason for g in ours]
    worst = max(abs(a - b) for x, y in zip(theirs, ours) for a, b in zip(x.logprobs, y.logprobs))
    assert worst < 1e-3, worst


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8, "top_k": 5}],
    ids=["plain", "cut"],
)
def test_logprobs_are_after_temperature_and_before_cuts(
    real, prompts, tokenizer, model_folder, sampling
):
    """Sampled tokens, scored by transformers as log_softmax(logits / 0.7): within 1e-3, also under
    top-p and top-k.
    """
    requests = requests_of(prompts[:8], tokenizer, **sampling)
    for prompt, result in zip(
        prompts, served(on_server(real, lambda server: generate_all(server, requests)))
    ):
        expected = scores(model_folder, prompt, result.token_ids, 0.7)
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-3, rtol=0)


def test_stop_tokens_end_and_close_the_completion(real, prompts, tokenizer):
    """The stop token is the last id, LENGTH has all tokens, and without stop tokens the end token
    is passed over.
    """

    async def scenario(server):
        (stopped,) = await generate_all(
            server, requests_of(prompts[:1], tokenizer, temperature=0.0)
        )
        assert (
            stopped.finish_reason is FinishReason.STOP
            and stopped.token_ids[-1] in tokenizer.eos_ids
        )
        cut = await server.generate(
            requests_of(prompts[:1], tokenizer, temperature=0.0, max_new_tokens=5)[0]
        )
        assert cut.finish_reason is FinishReason.LENGTH and cut.token_ids == stopped.token_ids[:5]
        own = stopped.token_ids[3]
        other = await server.generate(
            requests_of(
                prompts[:1], tokenizer, temperature=0.0, stop_token_ids=(own, *tokenizer.eos_ids)
            )[0]
        )
        assert other.token_ids == stopped.token_ids[: stopped.token_ids.index(own) + 1]
        on = await server.generate(long_request(tokenizer, prompts, 200))
        assert (
            len(on.token_ids) == 200 and on.token_ids[: len(stopped.token_ids)] == stopped.token_ids
        )

    on_server(real, scenario)


def test_seed_has_no_effect_without_deterministic_inference(real, prompts, tokenizer):
    """Two sampled runs with the same seeds differ: nothing may rest on seeds here."""
    requests = requests_of(prompts[:8], tokenizer, temperature=1.5, seed=11)
    first, second = (
        served(on_server(real, lambda server: generate_all(server, requests))) for _ in range(2)
    )
    assert [g.token_ids for g in first] != [g.token_ids for g in second]


def test_context_is_rejected_here_and_filled_exactly_there(real, prompts):
    """506 of 512 tokens can be had in full; the limits agree with the server's own figure."""

    async def scenario(server):
        await server.check_limits()
        full = GenerationRequest(
            tuple(range(1, 401)), SamplingParams(max_new_tokens=106, temperature=0.0)
        )
        assert len((await server.generate(full)).token_ids) == 106
        with pytest.raises(EngineFailure, match="507, over the context of 506"):
            await server.generate(GenerationRequest((1,) * 400, SamplingParams(max_new_tokens=107)))

    on_server(real, scenario)


def test_beyond_its_reserve_the_server_silently_samples_less(real):
    """Why max_context must be lower than the context: 400 + 112 = 512 gives 110 tokens and calls
    them the length.
    """

    async def scenario(server):
        with pytest.raises(EngineFailure, match="110 of max_new_tokens=112"):
            await server.generate(GenerationRequest((1,) * 400, SamplingParams(max_new_tokens=112)))
        with pytest.raises(EngineFailure, match="max_context=512 is over the 506"):
            await server.check_limits()

    on_server(real, scenario, max_context=512)


async def running_on(server):
    """The server's own count of running and waiting requests."""
    load = (await server._call("GET", "/v1/loads"))["loads"][0]
    return load["num_running_reqs"] + load["num_waiting_reqs"]


async def until_running(server, count):
    async with asyncio.timeout(20):
        while await running_on(server) != count:
            await asyncio.sleep(0.02)


def test_cancellation_and_deadline_reach_the_server(real, prompts, tokenizer):
    """Cancelled or late, the request is gone from the server's own count long before it would have
    ended.
    """

    async def scenario(server):
        task = asyncio.create_task(server.generate(long_request(tokenizer, prompts)))
        await until_running(server, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(0.5):
            await until_running(server, 0)
        assert not server.in_flight()

    on_server(real, scenario)
    with pytest.raises(EngineUnavailable, match="no answer within"):
        on_server(
            real,
            lambda server: server.generate(long_request(tokenizer, prompts)),
            request_timeout_s=0.2,
        )
    on_server(real, lambda server: asyncio.wait_for(until_running(server, 0), 0.5))


def test_aborted_requests_can_be_retried(real, prompts, tokenizer):
    """abort_all ends them with HTTP 200; the client says EngineUnavailable, and the same request is
    then served.
    """

    async def scenario(server):
        task = asyncio.create_task(server.generate(long_request(tokenizer, prompts)))
        await until_running(server, 1)
        await server.abort_all()
        with pytest.raises(EngineUnavailable, match="aborted"):
            await task
        assert len((await server.generate(long_request(tokenizer, prompts))).token_ids) == 400

    on_server(real, scenario)


def test_update_in_mid_generation_stamps_every_token(
    real, local, prompts, tokenizer, model_folder, other_folder
):
    """Paused (retract), weights replaced from disk with a flush, resumed: nothing lost, versions 0
    then 1, and the tokens after the update are those the new weights give for that prefix.
    """
    request = long_request(tokenizer, prompts)

    async def scenario(server):
        task = asyncio.create_task(server.generate(request))
        await until_running(server, 1)
        await asyncio.sleep(0.2)
        with pytest.raises(EngineFailure, match="with 1 requests running"):
            await server.update_weights_from_disk(other_folder, 1)
        await server.pause()
        health = await asyncio.wait_for(server.health(), 2)
        assert health.alive and health.paused
        await server.update_weights_from_disk(other_folder, 1)
        await server.resume()
        result = await task
        assert await server.weight_version() == 1
        await server.update_weights_from_disk(model_folder, 0)
        return result

    result = on_server(real, scenario)
    assert len(result.token_ids) == 400 and sorted(result.weight_versions) == list(
        result.weight_versions
    )
    old = result.weight_versions.count(0)
    assert 0 < old < 400
    before = asyncio.run(local.generate(request))
    assert result.token_ids[:old] == before.token_ids[:old]
    new = LocalEngine.from_folder(other_folder, max_batch_size=1, max_context=CONTEXT)
    rest = GenerationRequest(
        request.prompt_ids + result.token_ids[:old], SamplingParams(400 - old, temperature=0.0)
    )
    after = asyncio.run(new.generate(rest))
    assert result.token_ids[old:] == after.token_ids
    assert max(abs(a - b) for a, b in zip(result.logprobs[old:], after.logprobs)) < 1e-3


def test_in_place_pause_keeps_requests_and_rejects_a_flush(real, prompts, tokenizer, model_folder):
    """Mode in_place: flush_cache is rejected while the request is held; an update without a flush
    goes through.
    """

    async def scenario(server):
        task = asyncio.create_task(server.generate(long_request(tokenizer, prompts)))
        await until_running(server, 1)
        await server.pause(PauseMode.IN_PLACE)
        with pytest.raises(EngineFailure, match="400 Flush cache failed"):
            await server.flush_cache()
        await server.update_weights_from_disk(model_folder, 2, flush_cache=False)
        await server.resume()
        assert set((await task).weight_versions) == {0, 2}
        await server.update_weight_version(0)

    on_server(real, scenario)


def test_probe_and_health_of_a_working_server(real):
    """A token on demand; health knows the version, and server_info shows no secret."""

    async def scenario(server):
        await server.probe(20.0)
        health = await server.health()
        assert (health.alive, health.paused, health.weight_version) == (True, False, 0)
        info = await server.server_info()
        assert info["version"] == "0.5.21" and not any(
            "api_key" in name or name == "launch_command" for name in info
        )

    on_server(real, scenario)


def test_update_without_a_pause_waits_for_running_requests(real, prompts, tokenizer, model_folder):
    """All tokens of the running request have the old version: the update began after it ended."""

    async def scenario(server):
        task = asyncio.create_task(server.generate(long_request(tokenizer, prompts)))
        await until_running(server, 1)
        await server.update_weights_from_disk(model_folder, 3, flush_cache=False)
        assert set((await task).weight_versions) == {0}
        await server.update_weight_version(0)

    on_server(real, scenario)
