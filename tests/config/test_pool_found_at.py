from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError, EngineConfig, PoolConfig


def test_a_pool_launched_by_somebody_else_keeps_what_its_clients_read() -> None:
    """Slurm starts the servers that the pool describes: what is left is their addresses, their size (a process group
    counts every GPU) and the clients' times, and the pool is a valid one with urls.
    """
    pool = PoolConfig(servers=2, tensor_parallel=4, first_gpu=4, server_args=["--x"], server_env={"A": "1"}, python="p",
                      router=True, max_restarts=1, start_timeout_s=9, request_timeout_s=7)
    found = pool.found_at(["http://a:1", "http://b:1"])
    assert found == PoolConfig(urls=["http://a:1", "http://b:1"], tensor_parallel=4, request_timeout_s=7)
    assert EngineConfig(kind="sglang", policy=found).num_engines("policy") == 2


def test_addresses_are_checked() -> None:
    """A torn list of addresses is a configuration error, not a server that never answers."""
    with pytest.raises(ConfigError, match="http://host:port"):
        EngineConfig(kind="sglang", policy=PoolConfig(servers=1).found_at(["http://a:1", ""]))
