"""From a configuration to a fleet of vLLM servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fake_vllm import KEY, NAME, FakeVllm

from spark_nemo.config import ConfigError, EngineConfig, PoolConfig
from spark_nemo.engines import (
    EngineLost,
    Generation,
    GenerationRequest,
    SamplingParams,
    build_engine,
    server_wrapper,
)
from spark_nemo.engines.fleet.server_launcher import ServerProcess
from spark_nemo.planning.preflight import check_stage3
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import ASSETS

REQUEST = GenerationRequest((5, 6), SamplingParams(max_new_tokens=4, temperature=0.0))


def vllm(max_context: int = 60, **pool) -> EngineConfig:
    return EngineConfig(
        kind="vllm", max_context=max_context, max_batch_size=4, policy=PoolConfig(**pool)
    )


def served_by(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> Generation:
    monkeypatch.setenv(server_wrapper.KEY_VARIABLE, KEY)

    async def scenario() -> Generation:
        async with fake.serve() as url:
            fleet = build_engine(
                vllm(urls=[url], pool_down_timeout_s=0.5), ASSETS / "verifier", NAME
            )
            try:
                return await fleet.generate(REQUEST)
            finally:
                await fleet.close()

    return asyncio.run(scenario())


def test_a_given_vllm_server_serves_through_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, context and kind of log-probabilities are checked before the first request."""
    assert served_by(FakeVllm(), monkeypatch).token_ids


def test_log_probabilities_of_another_meaning_keep_a_server_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's default is before temperature."""
    with pytest.raises(EngineLost, match="--logprobs-mode processed_logprobs"):
        served_by(FakeVllm(processed=False), monkeypatch)


def test_a_launched_server_is_guarded_and_named_by_its_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrapper becomes vLLM; the key is in the environment only. Nothing is started here."""
    launchers: list[ServerProcess] = []
    monkeypatch.setattr(ServerProcess, "launch", lambda self: launchers.append(self))
    pool = {
        "servers": 1,
        "tensor_parallel": 2,
        "python": "/env/bin/python",
        "server_args": ["--enforce-eager"],
    }
    build_engine(vllm(**pool), ASSETS / "verifier", "policy", tmp_path)
    (launcher,) = launchers
    words = launcher.command("127.0.0.1", 1234)
    assert words[:4] == ["/env/bin/python", server_wrapper.__file__, "exec", "/env/bin/python"]
    for said in (
        "--served-model-name policy",
        "--tensor-parallel-size 2",
        "--max-model-len 60",
        "--port 1234",
    ):
        assert said in " ".join(words)
    assert (
        launcher.environment["VLLM_API_KEY"] not in " ".join(words)
        and words[-1] == "--enforce-eager"
    )


def test_what_vllm_cannot_do_is_rejected() -> None:
    """GPUs are chosen by its environment; stage III's policy changes its weights."""
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        build_engine(vllm(servers=1, first_gpu=1), ASSETS / "verifier", "policy")
    with pytest.raises(ConfigError, match="stage III needs sglang or local"):
        check_stage3(
            compose_config(["+experiment=toy", "engine.kind=vllm", "pipeline.parallel_jobs=1"])
        )
