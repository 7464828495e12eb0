from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError, EngineConfig, PoolConfig


def test_a_pool_launched_by_slurm_keeps_its_client_settings() -> None:
    """The result is a valid pool with urls. It keeps the servers' size (a process group counts
    every GPU) and the clients' timeouts.
    """
    pool = PoolConfig(
        servers=2,
        tensor_parallel=4,
        first_gpu=4,
        server_args=["--x"],
        server_env={"A": "1"},
        python="p",
        router=True,
        max_restarts=1,
        start_timeout_s=9,
        request_timeout_s=7,
    )
    found = pool.found_at(["http://a:1", "http://b:1"])
    assert found == PoolConfig(
        urls=["http://a:1", "http://b:1"],
        tensor_parallel=4,
        request_timeout_s=7,
        pool_down_timeout_s=120,
    )
    assert EngineConfig(kind="sglang", policy=found).num_engines("policy") == 2


@pytest.mark.parametrize(
    ("times", "lost"),
    [
        ({}, 900),
        ({"start_timeout_s": 1800}, 1800),
        ({"start_timeout_s": 1800, "pool_down_timeout_s": 60}, 60),
    ],
)
def test_a_pool_that_is_down_has_the_time_of_a_start_to_come_back(
    times: dict[str, float], lost: float
) -> None:
    """Slurm restarts a dead server, which the pool cannot observe. A large model takes minutes to
    start, so the default of two minutes would end every run whose only server died once. A set
    time is kept.
    """
    assert PoolConfig(servers=1, **times).found_at(["http://a:1"]).pool_down_timeout_s == lost


def test_addresses_are_checked() -> None:
    """A truncated list of addresses is a configuration error, not a server that never answers."""
    with pytest.raises(ConfigError, match="http://host:port"):
        EngineConfig(kind="sglang", policy=PoolConfig(servers=1).found_at(["http://a:1", ""]))
