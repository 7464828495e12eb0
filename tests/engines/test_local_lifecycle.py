"""Weight updates, pauses, rejections, cancelling and the end of the embedded engine."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from engine_cases import CONTEXT, VOCAB, ask, generate_all, named

from spark_nemo.config import EngineConfig
from spark_nemo.engines import EngineFailure, build_engine, run_async
from spark_nemo.engines.local import LocalEngine, read_spec
from spark_nemo.records.fingerprint import model_fingerprint

INDEX = "model.safetensors.index.json"


async def steps(engine, count):
    """Let the event loop run until the engine has made ``count`` more tokens."""
    wanted = (await engine.health()).tokens_generated + count
    while (await engine.health()).tokens_generated < wanted:
        await asyncio.sleep(0)


def test_updated_engine_equals_one_built_from_the_new_weights(folder, other_model, prompts):
    """Bit-equal generations, also for a prompt that was cached under the old weights."""

    async def scenario():
        requests = [ask(prompt, seed=1) for prompt in prompts]
        engine = LocalEngine.from_folder(folder, max_batch_size=8, max_context=CONTEXT)
        await generate_all(engine, requests)
        await engine.update_weights(named(other_model), version=3)
        fresh = LocalEngine(
            read_spec(folder),
            named(other_model),
            max_batch_size=8,
            max_context=CONTEXT,
            version=3,
        )
        assert await generate_all(engine, requests) == await generate_all(fresh, requests)

    asyncio.run(scenario())


def test_update_copies_what_it_is_given(engine, other_model, prompts):
    """A trainer that goes on writing into its tensors does not change the served weights."""

    async def scenario():
        tensors = {name: tensor.clone() for name, tensor in named(other_model)}
        await engine.update_weights(tensors.items(), version=1)
        before = await engine.generate(ask(prompts[3], seed=1))
        for tensor in tensors.values():
            tensor.zero_()
        assert await engine.generate(ask(prompts[3], seed=1)) == before

    asyncio.run(scenario())


def missing(tensors):
    return tensors[:-1], "model.norm.weight is missing"


def unknown(tensors):
    return [*tensors, ("model.layers.9.extra", torch.zeros(1))], "model.layers.9.extra is not part"


def misshapen(tensors):
    return [
        *tensors[:-1],
        ("model.norm.weight", torch.zeros(3)),
    ], r"model.norm.weight has shape \(3,\)"


def twice(tensors):
    return [*tensors, tensors[0]], "given twice"


def untied_head(tensors):
    return [*tensors, ("lm_head.weight", torch.zeros(VOCAB, 32))], "lm_head.weight differs"


@pytest.mark.parametrize("corrupt", [missing, unknown, misshapen, twice, untied_head])
def test_rejected_update_changes_nothing(engine, other_model, prompts, corrupt):
    """The error names the tensor; generations and version stay as they were."""

    async def scenario():
        before = await engine.generate(ask(prompts[4], seed=1))
        tensors, message = corrupt(named(other_model))
        with pytest.raises(EngineFailure, match=message):
            await engine.update_weights(tensors, version=8)
        assert (await engine.health()).weight_version == 0
        assert await engine.generate(ask(prompts[4], seed=1)) == before

    asyncio.run(scenario())


def test_every_token_carries_its_version(engine, other_model, prompts):
    """An update in mid-generation: earlier tokens keep the old version and values, later ones have
    the new one.
    """

    async def scenario():
        reference = await engine.generate(ask(prompts[4], seed=1, max_new_tokens=30))
        task = asyncio.create_task(engine.generate(ask(prompts[4], seed=1, max_new_tokens=30)))
        await steps(engine, 10)
        await engine.update_weights(named(other_model), version=5)
        await engine.update_weights(named(other_model), version=6)
        await steps(engine, 5)
        await engine.update_weights(named(other_model), version=7)
        result = await task
        versions = result.weight_versions
        assert sorted(versions) == list(versions) and set(versions) == {0, 6, 7}
        old = versions.count(0)
        assert old == 10 and result.token_ids[:old] == reference.token_ids[:old]
        assert result.token_ids != reference.token_ids
        later = await engine.generate(ask(prompts[4], seed=1, max_new_tokens=3))
        assert later.weight_versions == (7, 7, 7)

    asyncio.run(scenario())


def test_pause_stops_tokens_and_resume_continues(engine, prompts):
    """No token is made while paused; afterwards the result is what it would have been."""

    async def scenario():
        reference = await engine.generate(ask(prompts[4], seed=1))
        running = asyncio.create_task(engine.generate(ask(prompts[4], seed=1)))
        await steps(engine, 5)
        await engine.pause()
        waiting = asyncio.create_task(engine.generate(ask(prompts[4], seed=1)))
        made = (await engine.health()).tokens_generated
        await asyncio.sleep(0.05)
        health = await engine.health()
        assert (health.paused, health.tokens_generated, health.running, health.waiting) == (
            True,
            made,
            1,
            1,
        )
        await engine.resume()
        assert (await running).token_ids == (await waiting).token_ids == reference.token_ids

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "request_, message",
    [
        (ask((1, VOCAB)), f"id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (ask((1, -1)), "id -1 is outside"),
        (
            ask(
                (),
            ),
            "prompt is empty",
        ),
        (ask((1,) * 100, max_new_tokens=40), "prompt of 100 tokens.*140.*128"),
    ],
    ids=["too-large", "negative", "empty", "too-long"],
)
def test_bad_requests_are_rejected_alone(engine, prompts, request_, message):
    """The error says why; a good request in the same batch is served."""

    async def scenario():
        bad, good = await generate_all(engine, [request_, ask(prompts[1], seed=0)])
        with pytest.raises(EngineFailure, match=message):
            raise bad
        assert len(good.token_ids) == 20

    asyncio.run(scenario())


def test_context_can_be_filled_to_the_last_token(engine):
    """prompt + max_new_tokens equal to the context is served in full."""
    result = asyncio.run(engine.generate(ask((3,) * 100, max_new_tokens=28, temperature=0.0)))
    assert len(result.token_ids) == 28


def test_close_fails_what_is_in_flight(engine, prompts):
    """Running, waiting and later requests all end in EngineFailure; closing twice is fine."""

    async def scenario():
        tasks = [asyncio.create_task(engine.generate(ask(prompts[2], seed=n))) for n in range(12)]
        await steps(engine, 10)
        await engine.close()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=5)
        assert all(isinstance(result, EngineFailure) for result in results)
        with pytest.raises(EngineFailure, match="closed"):
            await engine.generate(ask(prompts[2]))
        with pytest.raises(EngineFailure, match="closed"):
            await engine.update_weights([], version=1)
        await engine.close()
        health = await engine.health()
        assert (health.alive, health.running, health.waiting) == (False, 0, 0)

    asyncio.run(scenario())


def test_close_while_paused_does_not_hang(engine, prompts):
    """A paused engine can be closed."""

    async def scenario():
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask(prompts[2])))
        await asyncio.sleep(0)
        await asyncio.wait_for(engine.close(), timeout=5)
        with pytest.raises(EngineFailure):
            await task

    asyncio.run(scenario())


def test_crash_fails_everybody_instead_of_hanging(engine, other_model, prompts):
    """NaN weights stop the engine: all requests get EngineFailure with the cause, and so do later
    ones.
    """

    async def scenario():
        await engine.update_weights(
            [(n, t * float("nan")) for n, t in named(other_model)], version=1
        )
        results = await asyncio.wait_for(
            generate_all(engine, [ask(p, seed=0) for p in prompts]), timeout=5
        )
        assert all(isinstance(r, EngineFailure) and "not finite" in str(r) for r in results)
        assert not (await engine.health()).alive

    asyncio.run(scenario())


def test_cancelled_request_leaves_the_batch(engine, prompts):
    """Its companions finish with the tokens they would have had; the engine is idle afterwards."""

    async def scenario():
        reference = await generate_all(engine, [ask(p, seed=0) for p in prompts])
        tasks = [asyncio.create_task(engine.generate(ask(p, seed=0))) for p in prompts]
        await steps(engine, 20)
        for cancelled in (0, 3, len(prompts) - 1):
            tasks[cancelled].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for n, (result, expected) in enumerate(zip(results, reference)):
            if n in (0, 3, len(prompts) - 1):
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert result.token_ids == expected.token_ids
        health = await engine.health()
        assert (health.alive, health.running, health.waiting) == (True, 0, 0)

    asyncio.run(scenario())


def test_other_coroutines_keep_autograd(engine, prompts):
    """Between steps, and after a generation is left halfway, torch is not in inference mode."""

    async def scenario():
        task = asyncio.create_task(engine.generate(ask(prompts[4], seed=1)))
        for _ in range(3):
            await steps(engine, 1)
            assert not torch.is_inference_mode_enabled()
        return task

    run_async(scenario())
    assert not torch.is_inference_mode_enabled()
    run_async(engine.close())


def test_factory_builds_the_configured_engine(folder):
    """EngineConfig's numbers arrive; the context is cut to what the model can do."""
    engine = build_engine(
        EngineConfig(kind="local", max_batch_size=3, max_context=4096), folder, "policy"
    )
    assert isinstance(engine, LocalEngine) and engine.max_context == CONTEXT


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope type 'yarn'"),
    ],
)
def test_unsupported_architecture_is_rejected(folder, tmp_path, change, message):
    """A folder this decoder would compute wrongly does not load."""
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | change)
    )
    with pytest.raises(EngineFailure, match=message):
        LocalEngine.from_folder(tmp_path, max_batch_size=1, max_context=16)


def test_folder_without_weights_is_rejected(folder, tmp_path):
    """The error names the folder."""
    with pytest.raises(EngineFailure, match=r"no config\.json"):
        LocalEngine.from_folder(tmp_path, max_batch_size=1, max_context=16)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(EngineFailure, match=r"no \.safetensors files"):
        LocalEngine.from_folder(tmp_path, max_batch_size=1, max_context=16)


DAMAGES = {
    "config is no JSON": ("config.json", "{"),
    "config is a list": ("config.json", "[]"),
    "config is no UTF-8": ("config.json", b"\xff\xfe"),
    **{
        f"config without {key}": ("config.json", key)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
    },
    "index is no JSON": (INDEX, "{"),
    "index without a map": (INDEX, "{}"),
    "index leads out": (INDEX, '{"weight_map": {"model.norm.weight": "../outside.safetensors"}}'),
    "index names no file": (INDEX, '{"weight_map": {"model.norm.weight": "none.safetensors"}}'),
    "weights are cut": ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(folder, tmp_path, damage):
    """Every damage is an ``EngineFailure`` with the file in it, and no file outside the folder is
    read.
    """
    shutil.copytree(folder, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    file, content = DAMAGES[damage]
    if damage.startswith("config without"):
        config = json.loads((folder / file).read_text())
        content = json.dumps({name: value for name, value in config.items() if name != content})
    (tmp_path / "model" / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(EngineFailure, match=re.escape(str(tmp_path / "model"))) as caught:
        LocalEngine.from_folder(tmp_path / "model", max_batch_size=1, max_context=16)
    assert file in str(caught.value) or "none.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ],
)
def test_an_identity_changes_with_every_file_that_is_read(tmp_path, file):
    """Stored results are found by it: a folder with another chat template or other end-of-sequence
    ids says other things. A file that is not there does not count, so folders without one keep the
    fingerprint they had.
    """
    (tmp_path / "config.json").write_text("{}")
    found = []
    for text in ("first", "other"):
        (tmp_path / file).write_text(text)
        found.append(model_fingerprint(tmp_path))
    assert found[0] != found[1]


@pytest.mark.slow
def test_engines_do_not_import_transformers():
    """Start-up is paid by every process: the package must come up without the slow import."""
    code = "import sys, spark_nemo.engines; assert 'transformers' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
