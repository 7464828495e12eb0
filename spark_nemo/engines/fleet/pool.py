"""Build the fleet of a role's servers, launched here or given by URL, for any kind of engine."""

from __future__ import annotations

import logging
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from spark_nemo.config import ConfigError, EngineConfig, PoolConfig
from spark_nemo.config.engine import POOL_DOWN_TIMEOUT_S, START_TIMEOUT_S

from ..base import Engine
from .fleet import Fleet
from .replica import TOKEN_TIMEOUT_S, FleetLimits, RouterHandle, ServerLauncher
from .server_launcher import ServerProcess

log = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)
_OWN_FILES = 1024
"""Files that this process may open in addition to its connections."""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """Command line and environment of one kind of server."""

    command: Callable[[int, str, int], Sequence[str]]
    """Command line by index in the pool, host and port."""
    environment: Mapping[str, str]
    """Variables that this kind of server needs."""


def build_fleet(
    config: EngineConfig,
    role: str,
    connect: Callable[[str], Engine],
    launch: LaunchSpec,
    log_dir: Path | None,
    router: RouterHandle | None = None,
) -> Fleet:
    """Return the fleet of ``role``.

    Launched servers are still starting when this returns, so that pools start together.

    Raises ``EngineFailure`` when the interpreter of the servers does not exist.
    """
    pool = config.pool(role)
    connections = connections_per_server(config) * config.num_engines(role)
    allow_open_files(connections if router is None else 2 * connections)
    replicas: dict[str, Engine | ServerLauncher] = {url: connect(url) for url in pool.urls}
    for index in range(pool.servers or 0):
        name = f"{role}-{index}"
        process = ServerProcess(
            name,
            partial(launch.command, index),
            connect,
            log_path=log_folder(log_dir) / f"{name}.log",
            host=host_of(pool),
            environment={**search_path(pool), **pool.server_env, **launch.environment},
            start_timeout_s=or_else(pool.start_timeout_s, START_TIMEOUT_S),
            max_restarts=or_else(pool.max_restarts, 3),
        )
        process.launch()
        replicas[name] = process
    return Fleet(replicas, pool_limits(pool), name=f"{role} pool", router=router)


def connections_per_server(config: EngineConfig) -> int:
    """Return how many requests one server is sent at once.

    Twice what it decodes together: a slot that becomes free there is filled without a round trip.
    """
    return 2 * config.max_batch_size


def allow_open_files(more: int) -> None:
    """Raise this process's limit of open files by ``more``, for each connection is one.

    The usual limit of 1,024 is reached with the third server, and requests would fail.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError) as error:
        log.debug("the limit of open files stays %d: %s", soft, error)
        wanted = soft
    if wanted < min(soft, _OWN_FILES) + more:
        log.warning(
            "this process may open %d files and its servers need up to %d connections: raise the "
            "limit (ulimit -Hn), or lower engine.max_batch_size",
            wanted,
            more,
        )


def pool_limits(pool: PoolConfig) -> FleetLimits:
    """Return the fleet's limits as configured."""
    request_s = or_else(pool.request_timeout_s, 600.0)
    probe_s = or_else(pool.probe_timeout_s, 30.0)
    return FleetLimits(
        request_timeout_s=request_s,
        token_timeout_s=TOKEN_TIMEOUT_S if pool.request_timeout_s is None else 0.0,
        total_timeout_s=6 * request_s,
        probe_timeout_s=probe_s,
        probe_every_s=min(10.0, probe_s),
        pool_down_timeout_s=or_else(pool.pool_down_timeout_s, POOL_DOWN_TIMEOUT_S),
    )


def python_of(pool: PoolConfig) -> str:
    """Return the Python interpreter of the servers' environment."""
    return pool.python or sys.executable


def require_module(pool: PoolConfig, role: str, module: str, variable: str) -> None:
    """Raise ``ConfigError`` when this interpreter launches servers and lacks ``module``.

    Without this check the user would find a traceback in a server's log.
    """
    if pool.servers and pool.python is None and find_spec(module) is None:
        raise ConfigError(
            f"engine.{role}.servers={pool.servers}: this Python has no {module}; name one "
            f"that has, {variable}=ENV/bin/python with the +engine presets or "
            f"engine.{role}.python=ENV/bin/python"
        )


def host_of(pool: PoolConfig) -> str:
    """Return the address on which launched servers listen."""
    return pool.host or "127.0.0.1"


def search_path(pool: PoolConfig) -> dict[str, str]:
    """Return an empty search path for another interpreter: ours would shadow its packages."""
    return {"PYTHONPATH": ""} if pool.python else {}


def log_folder(folder: Path | None) -> Path:
    """Return the caller's folder, or one under the system's temporary folder."""
    return folder or Path(tempfile.gettempdir()) / f"spark-nemo-servers-{os.getpid()}"


def or_else(value: Number | None, default: Number) -> Number:
    """Return ``value`` if it is set, also if it is 0."""
    return default if value is None else value
