"""From a configuration to a fleet of servers: given ones, their limits, and what is launched with
which words.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from pathlib import Path

import pytest
from fake_sglang import FakeSglang
from fleet_cases import until

from spark_nemo.config import ConfigError, EngineConfig, PoolConfig
from spark_nemo.engines import (
    EngineLost,
    EngineUnavailable,
    GenerationRequest,
    SamplingParams,
    build_engine,
    server_wrapper,
)
from spark_nemo.engines.fleet import Fleet
from spark_nemo.engines.fleet.pool import allow_open_files
from spark_nemo.engines.fleet.server_launcher import ServerProcess
from spark_nemo.engines.sglang.launch import CheckedServer
from spark_nemo.toy.resolve import ASSETS

TOY = ASSETS / "generator"
REQUEST = GenerationRequest((5, 6), SamplingParams(max_new_tokens=8, temperature=0.0))


def not_launched(monkeypatch: pytest.MonkeyPatch) -> list[ServerProcess]:
    """The servers that would be launched; their processes are not started."""
    launchers: list[ServerProcess] = []
    monkeypatch.setattr(ServerProcess, "launch", lambda self: launchers.append(self))
    return launchers


def toy_server() -> FakeSglang:
    return FakeSglang(vocab_size=691, context=512)


def sglang(max_context: int = 320, **pool) -> EngineConfig:
    return EngineConfig(
        kind="sglang", max_context=max_context, max_batch_size=4, policy=PoolConfig(**pool)
    )


@pytest.mark.parametrize(("kind", "module"), [("sglang", "sglang"), ("vllm", "vllm")])
def test_servers_that_this_python_cannot_launch_are_rejected(
    kind: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves one line instead of restarts and a traceback in a log; another environment's packages
    are not looked at.
    """
    monkeypatch.setattr("spark_nemo.engines.fleet.pool.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"no {module}; name one .*SPARK_{kind.upper()}_PYTHON"):
        build_engine(
            EngineConfig(kind=kind, max_context=320, policy=PoolConfig(servers=1)), TOY, "policy"
        )


def test_given_servers_serve_as_one_engine() -> None:
    """Two fake servers by URL; both get work and outlive the fleet."""

    async def scenario():
        async with toy_server() as first, toy_server() as second:
            urls = [first.url, second.url]
            answers, replicas = await answers_of(urls)
            assert first.running == second.running == {}
            return answers, replicas, urls

    async def answers_of(urls):
        fleet = build_engine(sglang(urls=urls), TOY, "policy")
        try:
            assert isinstance(fleet, Fleet)
            await fleet.generate(REQUEST)
            await until(lambda: fleet.metrics().replicas_up == 2, 20)
            answers = await asyncio.gather(*(fleet.generate(REQUEST) for _ in range(4)))
            return answers, sorted(fleet.replicas())
        finally:
            await fleet.close()

    answers, replicas, urls = asyncio.run(scenario())
    assert len({answer.token_ids for answer in answers}) == 1 and replicas == sorted(urls)


def said_of_open_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limits
) -> str:
    """The log of a pool of 16 servers in a process with ``limits`` (soft, hard) of open files."""
    monkeypatch.setattr("resource.getrlimit", lambda which: limits)
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: None)
    allow_open_files(16 * 512)
    return caplog.text


def test_a_hard_limit_of_open_files_below_the_connections_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before any request fails of it, with the two ways out."""
    said = said_of_open_files(monkeypatch, caplog, (1024, 4096))
    assert "may open 4096 files" in said and "8192 connections" in said
    assert "ulimit -Hn" in said and "engine.max_batch_size" in said


def test_a_limit_of_open_files_far_over_the_connections_is_not_complained_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Soft and hard limit are often the same large number on a cluster; nothing can be raised, and
    nothing need be.
    """
    assert (
        said_of_open_files(monkeypatch, caplog, (1_048_576, 1_048_576)) == "" and not caplog.records
    )


def test_a_given_server_with_a_shorter_context_is_not_used() -> None:
    """SGLang would cut samples short without an error."""

    async def scenario():
        async with FakeSglang(vocab_size=691, context=200) as fake:
            fleet = build_engine(sglang(urls=[fake.url], pool_down_timeout_s=0.5), TOY, "policy")
            try:
                await fleet.generate(REQUEST)
            finally:
                await fleet.close()

    with pytest.raises(EngineLost, match=r"max_context=320.*194.*lower engine\.max_context"):
        asyncio.run(scenario())


def test_a_server_in_its_own_warm_up_is_not_up_yet() -> None:
    """SGLang generates before its warm-up request has ended, but ``/health`` is 503 until then: let
    in now, it would be busy with real prompts at its first health check, its warm-up behind them,
    and be killed as dead. How long a real warm-up waits behind real prompts is not proven.
    """

    async def scenario():
        async with FakeSglang(context=512) as fake:
            server = CheckedServer(
                fake.url,
                api_key=None,
                vocab_size=64,
                max_context=320,
                max_in_flight=4,
                request_timeout_s=20.0,
                control_timeout_s=5.0,
            )
            try:
                fake.faults.starting = True
                with pytest.raises(EngineUnavailable, match="503"):
                    await server.probe(2.0)
                fake.faults.starting = False
                await server.probe(2.0)
            finally:
                await server.close()

    asyncio.run(scenario())


def test_the_command_of_a_launched_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, layout, context with SGLang's reserve, first GPU, weight version 0; the key is in the
    environment only, a new one for every pool, and this interpreter's search path is not passed on.
    Nothing is started here.
    """
    launchers = not_launched(monkeypatch)
    pool = {
        "servers": 2,
        "tensor_parallel": 2,
        "first_gpu": 4,
        "python": "/env/bin/python",
        "server_args": ["--dtype", "float32"],
        "server_env": {"A": "b"},
    }
    for _ in range(2):
        build_engine(sglang(**pool), TOY, "policy", tmp_path)
    launcher, other = launchers[1], launchers[3]
    words = launcher.command("127.0.0.1", 1234)
    text = " ".join(words)
    assert words[:3] == ["/env/bin/python", server_wrapper.__file__, "server"] and words[-2:] == [
        "--dtype",
        "float32",
    ]
    for said in (
        f"--model-path {TOY}",
        "--tp-size 2",
        "--base-gpu-id 6",
        "--context-length 326",
        "--weight-version 0",
        "--max-running-requests 4",
        "--host 127.0.0.1 --port 1234",
    ):
        assert said in text
    key = launcher.environment[server_wrapper.KEY_VARIABLE]
    assert (
        len(key) > 30 and key not in text and key != other.environment[server_wrapper.KEY_VARIABLE]
    )
    assert launcher.environment["PYTHONPATH"] == "" and launcher.environment["A"] == "b"
    assert launcher.log_path == tmp_path / "policy-1.log"


def test_a_router_waits_as_long_as_the_longest_request_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sglang-router's own limit is 1800 s (its router_args.py), which a response of 32k tokens on a
    full server passes; what it cuts off is sampled again from the start. Nothing is started here.
    """
    not_launched(monkeypatch)
    pool = {"servers": 1, "python": "/env/bin/python", "router": True}
    for more, seconds in (({}, 600 + 0.25 * 320), ({"request_timeout_s": 7200.0}, 7200)):
        words = build_engine(
            sglang(**pool, **more), TOY, "policy", tmp_path
        )._router.launcher.command("127.0.0.1", 1234)
        assert int(words[words.index("--request-timeout-secs") + 1]) >= seconds


def test_a_context_beyond_the_models_is_cut_to_what_sglang_can_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy task's models have 512 positions; SGLang keeps six."""
    launchers = not_launched(monkeypatch)
    monkeypatch.setattr(
        "spark_nemo.engines.fleet.pool.find_spec", lambda name: name
    )  # as if SGLang were here
    build_engine(sglang(max_context=4096, servers=1), TOY, "policy", tmp_path)
    words = launchers[0].command("h", 1)
    assert words[words.index("--context-length") + 1] == "512" and words[0] == sys.executable


def test_what_cannot_be_built_is_named(tmp_path: Path) -> None:
    """A role without servers, a folder without a model, an engine that this version has not."""
    with pytest.raises(ConfigError, match=r"engine\.verifier: set either"):
        build_engine(sglang(servers=1), TOY, "verifier")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build_engine(sglang(servers=1), tmp_path, "policy")
    with pytest.raises(ConfigError, match="pool='judge'"):
        build_engine(EngineConfig(), TOY, "judge")


PROXIES = {
    "http_proxy": "http://proxy:3128",
    "HTTPS_PROXY": "http://proxy:3128",
    "all_proxy": "socks5://proxy:1080",
    "no_proxy": "10.9.9.9",
    "NO_PROXY": "10.8.8.8",
}


def test_a_server_reaches_itself_past_the_clusters_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks itself over HTTP in its warm-up, by ``requests``, which takes the proxy of the
    environment even for 127.0.0.1; when the proxy rejects that, it exits. Proven by the rules of
    Python's own library.
    """
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    server_wrapper._bypass_proxies("server", ["--host", "10.0.0.4", "--port", "30000"])
    for host in ("10.0.0.4:30000", "127.0.0.1:30000", "localhost", "10.9.9.9", "10.8.8.8"):
        assert urllib.request.proxy_bypass_environment(host)
    assert not urllib.request.proxy_bypass_environment("10.0.0.5")
    assert (
        urllib.request.getproxies_environment()["https"] == PROXIES["HTTPS_PROXY"]
    )  # for what it may download


def test_a_router_knows_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its servers are not known when it starts, and all of them are of this cluster."""
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    server_wrapper._bypass_proxies("router", ["--host", "127.0.0.1"])
    assert set(urllib.request.getproxies_environment()) <= {"no"}
