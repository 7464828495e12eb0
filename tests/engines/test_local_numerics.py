"""The embedded engine's numbers against transformers and against itself."""

import asyncio

import pytest
import torch
from engine_cases import CONTEXT, VOCAB, ask, generate_all, make_model, named
from transformers import Qwen2ForCausalLM

from spark_nemo.engines import FinishReason
from spark_nemo.engines.local import LocalEngine, read_spec


def serve(engine, requests):
    results = asyncio.run(generate_all(engine, requests))
    assert not [result for result in results if isinstance(result, Exception)]
    return results


def reference_logprobs(model, prompt, response, temperature):
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp_TV = torch.log_softmax(logits_TV / temperature, -1)
    return logp_TV.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def test_greedy_equals_transformers(any_model, prompts):
    """Token for token over mixed prompt lengths in a batch smaller than the requests; says nothing
    of other sizes.
    """
    model, folder = any_model
    engine = LocalEngine.from_folder(folder, max_batch_size=5, max_context=CONTEXT)
    results = serve(engine, [ask(prompt, temperature=0.0, max_new_tokens=80) for prompt in prompts])
    for prompt, result in zip(prompts, results):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=80,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert result.token_ids == tuple(expected[0, len(prompt) :].tolist())
        assert result.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.6, "seed": 4, "top_p": 0.8, "top_k": 9},
        {"temperature": 0.0},
    ],
    ids=["plain", "cut", "greedy"],
)
def test_logprobs_are_after_temperature_and_before_cuts(any_model, prompts, sampling):
    """log_softmax(logits / T) of transformers within 1e-4, also under top-p and top-k; greedy
    reports T=1.
    """
    model, folder = any_model
    engine = LocalEngine.from_folder(folder, max_batch_size=5, max_context=CONTEXT)
    for prompt, result in zip(
        prompts, serve(engine, [ask(prompt, **sampling) for prompt in prompts])
    ):
        expected = reference_logprobs(
            model, prompt, result.token_ids, sampling["temperature"] or 1.0
        )
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-4, rtol=0)


def mixed_requests(prompts):
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 5},
    ]
    return [
        ask(
            prompt,
            seed=1000 + n,
            max_new_tokens=5 + 7 * (n % 5),
            stop_token_ids=(n % VOCAB, 7)[: n % 3],
            **kinds[n % 4],
        )
        for n, prompt in enumerate([*prompts, *prompts])
    ]


@pytest.mark.parametrize("max_batch_size", [1, 3, 8, 64])
def test_results_do_not_depend_on_batch_size_or_companions(folder, prompts, max_batch_size):
    """Same tokens alone and in any batch, with rows of every kind coming and going."""
    requests = mixed_requests(prompts)
    alone = [
        serve(LocalEngine.from_folder(folder, max_batch_size=1, max_context=CONTEXT), [request])[0]
        for request in requests
    ]
    together = serve(
        LocalEngine.from_folder(folder, max_batch_size=max_batch_size, max_context=CONTEXT),
        requests,
    )
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.finish_reason for result in together] == [
        result.finish_reason for result in alone
    ]


def test_same_requests_again_are_bit_identical(folder, prompts):
    """Exact resume needs equal log-probabilities to the last bit, on a used engine and on
    a fresh one.
    """
    requests = mixed_requests(prompts)
    engine = LocalEngine.from_folder(folder, max_batch_size=6, max_context=CONTEXT)
    first = serve(engine, requests)
    serve(engine, requests[5:9])
    assert serve(engine, requests) == first
    assert (
        serve(LocalEngine.from_folder(folder, max_batch_size=6, max_context=CONTEXT), requests)
        == first
    )


def test_seed_none_draws_afresh(folder, prompts):
    """Two unseeded runs differ (61**20 equally unlikely coincidences aside), two seeded ones do
    not.
    """
    engine = LocalEngine.from_folder(folder, max_batch_size=6, max_context=CONTEXT)
    unseeded, seeded = (
        [ask(prompts[2], temperature=1.5)] * 2,
        [ask(prompts[2], temperature=1.5, seed=1)] * 2,
    )
    first, second = serve(engine, unseeded)
    assert first.token_ids != second.token_ids
    first, second = serve(engine, seeded)
    assert first == second


def test_shared_prompts_are_prefilled_once_and_give_the_same(folder, prompts, monkeypatch):
    """Sixteen votes on one prompt equal sixteen votes computed apart, and cost one prefill."""
    requests = [ask(prompts[2], seed=n) for n in range(16)]
    apart = [
        serve(LocalEngine.from_folder(folder, max_batch_size=1, max_context=CONTEXT), [request])[0]
        for request in requests
    ]
    engine = LocalEngine.from_folder(folder, max_batch_size=6, max_context=CONTEXT)
    prefilled = []
    prefill = engine._decoder.prefill
    monkeypatch.setattr(
        engine._decoder, "prefill", lambda group: prefilled.extend(group) or prefill(group)
    )
    together = serve(engine, requests)
    assert [result.token_ids for result in together] == [result.token_ids for result in apart]
    assert prefilled == [prompts[2][:-1]]


def test_stop_token_ends_and_is_included(folder, prompts):
    """The stop token is the last token; a stop token on the last allowed place counts as STOP."""
    engine = LocalEngine.from_folder(folder, max_batch_size=4, max_context=CONTEXT)
    free = serve(engine, [ask(prompts[4], seed=9)])[0]
    stop = free.token_ids[6]
    cut = free.token_ids.index(stop) + 1
    for limit in (20, cut):
        result = serve(
            engine, [ask(prompts[4], seed=9, stop_token_ids=(60, stop), max_new_tokens=limit)]
        )[0]
        assert (result.token_ids, result.finish_reason) == (free.token_ids[:cut], FinishReason.STOP)
        assert len(result.logprobs) == len(result.weight_versions) == cut


def test_bfloat16_folder_is_served_in_float32(tmp_path, prompts):
    """Weights saved in bfloat16 load, and log-probabilities match the same weights in float32."""
    make_model(2, tied=False).bfloat16().save_pretrained(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    engine = LocalEngine.from_folder(tmp_path, max_batch_size=4, max_context=CONTEXT)
    result = serve(engine, [ask(prompts[5], seed=0)])[0]
    expected = reference_logprobs(model, prompts[5], result.token_ids, 1.0)
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-4, rtol=0)


def test_weights_given_as_tensors_equal_a_folder(folder, model, prompts):
    """An engine built from named tensors answers as the one built from the folder."""
    built = LocalEngine(read_spec(folder), named(model), max_batch_size=4, max_context=CONTEXT)
    read = LocalEngine.from_folder(folder, max_batch_size=4, max_context=CONTEXT)
    requests = [ask(prompt, seed=1) for prompt in prompts]
    assert serve(built, requests) == serve(read, requests)
