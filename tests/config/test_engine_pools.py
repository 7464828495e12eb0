"""Settings of server pools: invalid combinations and presets."""

from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError, EngineConfig, PoolConfig
from spark_nemo.planning.dry_run import dry_run
from spark_nemo.run.compose import compose_config
from spark_nemo.run.local_executor import parallel_jobs

TWO = ["engine.kind=sglang", "engine.policy.servers=2", "pipeline.parallel_jobs=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine.policy.servers=2"],
            "engine.policy.servers=2 has no effect with engine.kind=local",
        ),
        (
            ["engine.verifier.router=true"],
            "engine.verifier.router=true has no effect with engine.kind=local",
        ),
        ([*TWO, "engine.policy.urls=[http://a:1]"], "set either engine.policy.servers"),
        (["engine.kind=sglang", "engine.policy.router=true"], "set either engine.policy.servers"),
        (
            [
                "engine.kind=sglang",
                "engine.policy.urls=[http://a:1]",
                "engine.policy.max_restarts=1",
            ],
            "engine.policy.max_restarts=1 has no effect with engine.policy.urls",
        ),
        (
            ["engine.kind=sglang", "engine.policy.urls=[a:1]"],
            "engine.policy.urls: 'a:1' is not http",
        ),
        (
            ["engine.kind=sglang", "engine.policy.urls=[http://a:1,http://a:1]"],
            "name each server once",
        ),
        ([*TWO, "engine.policy.host=0.0.0.0"], "engine.policy.host"),
        ([*TWO, "engine.policy.server_args=[--api-key,x]"], "--api-key would show the key"),
        (
            [*TWO, "engine.policy.server_args=['--port=1']"],
            "engine.policy.server_args: --port is set by",
        ),
        ([*TWO, "engine.policy.request_timeout_s=0"], "engine.policy.request_timeout_s"),
        ([*TWO, "engine.policy.max_restarts=-1"], "engine.policy.max_restarts"),
        ([*TWO, "engine.policy.sever_args=[]"], "sever_args"),
        ([*TWO, "pipeline.parallel_jobs=2"], "pipeline.parallel_jobs=2 with launched servers"),
        (
            [
                "engine.kind=vllm",
                "engine.policy.servers=1",
                "engine.policy.router=true",
                "pipeline.parallel_jobs=1",
            ],
            "engine.policy.router=true has no effect with engine.kind=vllm",
        ),
        (["engine.kind=slang"], "engine.kind='slang': choose one of local, sglang, vllm"),
    ],
)
def test_an_invalid_or_unread_pool_setting_is_an_error(overrides: list[str], message: str) -> None:
    """The messages name field and reason."""
    with pytest.raises(ConfigError) as raised:
        compose_config(overrides)
    assert message in str(raised.value)


def test_a_role_without_servers_is_an_error_only_when_it_is_needed() -> None:
    """Evaluating a policy needs no verifier pool."""
    config = compose_config(TWO).engine
    config.require("policy")
    with pytest.raises(
        ConfigError, match=r"engine\.verifier: set either engine\.verifier\.servers"
    ):
        config.require("verifier")
    with pytest.raises(ConfigError, match="pool='judge'"):
        config.pool("judge")


def test_slots_count_every_server() -> None:
    """The bound on requests in flight grows with the pool; the embedded engine counts as one."""
    assert EngineConfig(kind="local", max_batch_size=8).slots("verifier") == 8
    pool = PoolConfig(urls=["http://a:1", "http://b:1", "http://c:1"])
    assert EngineConfig(kind="sglang", max_batch_size=8, policy=pool).slots("policy") == 24


def test_the_cpu_preset_fits_the_toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two policy servers and a verifier server with a CPU's flags, all from conf/. The tests with
    real servers check that a server accepts the flags.
    """
    monkeypatch.setenv("SPARK_SGLANG_PYTHON", "/env/bin/python")
    config = compose_config(["+experiment=toy", "+engine=sglang_cpu"])
    engine = config.engine
    assert (engine.kind, engine.policy.servers, engine.verifier.servers, engine.max_context) == (
        "sglang",
        2,
        1,
        320,
    )
    assert engine.policy.python == engine.verifier.python == "/env/bin/python"
    assert engine.policy.server_args[:2] == ["--device", "cpu"] == engine.verifier.server_args[:2]
    assert engine.verifier.server_env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert parallel_jobs(config) == 1
    monkeypatch.delenv("SPARK_SGLANG_PYTHON")
    assert compose_config(["+experiment=toy", "+engine=sglang_cpu"]).engine.policy.python is None


def test_the_presets_that_were_never_run_are_valid() -> None:
    """They compose; their servers are not started."""
    assert compose_config(["+experiment=toy", "+engine=sglang"]).engine.verifier.first_gpu == 4
    assert compose_config(["+experiment=toy", "+engine=vllm_cpu"]).engine.kind == "vllm"


def test_a_plan_says_what_will_serve() -> None:
    """``--dry-run`` names the pools."""
    plan = dry_run(compose_config(["+experiment=toy", "+engine=sglang"]))
    assert "sglang, policy pool: 2 to launch here, tensor parallel 2, behind sglang-router" in plan


def test_a_router_before_given_servers_is_launched_and_may_say_where() -> None:
    """sglang-router needs the interpreter although the servers run already; arguments of the
    servers still have no effect.
    """
    PoolConfig(urls=["http://a:1"], router=True, python="/env/bin/python").check("engine.policy")
    with pytest.raises(ConfigError, match="server_args"):
        PoolConfig(urls=["http://a:1"], router=True, server_args=["--x"]).check("engine.policy")
