"""A role's servers from the configuration, whatever engine they run: launched here or given, as one
fleet.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from spark_nemo.config import ConfigError, EngineConfig, PoolConfig
from spark_nemo.config.engine import POOL_DOWN_TIMEOUT_S, START_TIMEOUT_S

from ..base import Engine
from .fleet import Fleet
from .limits import TOKEN_TIMEOUT_S, FleetLimits
from .replica import RouterHandle, ServerLauncher
from .server_launcher import ServerProcess

log = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)
CLIENT_SLACK = 1.5
"""A client's deadline over the fleet's, so that the fleet's, which knows of pauses, comes first."""
_OWN_FILES = 1024
"""Open files that this process may have beside its connections."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kind of server is started: ``command(index, host, port)``, and what its environment
    needs besides.
    """

    command: Callable[[int, str, int], Sequence[str]]
    environment: Mapping[str, str]


def fleet_of(
    config: EngineConfig,
    role: str,
    connect: Callable[[str], Engine],
    launch: Launch,
    log_dir: Path | None,
    front: RouterHandle | None = None,
) -> Fleet:
    """The pool of ``role``. Launched servers are starting when this returns, so that those of two
    pools start together.

    Raises ``EngineFailure`` when their interpreter does not exist.
    """
    pool, limits = config.pool(role), pool_limits(config.pool(role))
    allow_open_files(
        connections_per_server(config) * config.num_engines(role) * (2 if front else 1)
    )
    members: dict[str, Engine | ServerLauncher] = {url: connect(url) for url in pool.urls}
    for index in range(pool.servers or 0):
        name = f"{role}-{index}"
        process = ServerProcess(
            name,
            lambda host, port, index=index: launch.command(index, host, port),
            connect,
            log_path=log_folder(log_dir) / f"{name}.log",
            host=host_of(pool),
            environment={**search_path(pool), **pool.server_env, **launch.environment},
            start_timeout_s=or_else(pool.start_timeout_s, START_TIMEOUT_S),
            max_restarts=or_else(pool.max_restarts, 3),
        )
        process.launch()
        members[name] = process
    return Fleet(members, limits, name=f"{role} pool", front=front)


def connections_per_server(config: EngineConfig) -> int:
    """As many again as a server works on wait there, so that none of its slots is idle for a round
    trip.
    """
    return 2 * config.max_batch_size


def allow_open_files(more: int) -> None:
    """Raise this process's own limit of open files by ``more``, for each connection is one: the
    usual limit of 1,024 is over with the third server, and what it ends are requests.
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
            "this process may open %d files and its servers alone can want %d connections: raise the limit "
            "(ulimit -Hn), or lower engine.max_batch_size",
            wanted,
            more,
        )


def pool_limits(pool: PoolConfig) -> FleetLimits:
    """The fleet's bounds that the configuration sets."""
    request = or_else(pool.request_timeout_s, 600.0)
    probe = or_else(pool.probe_timeout_s, 30.0)
    return FleetLimits(
        request_timeout_s=request,
        token_timeout_s=TOKEN_TIMEOUT_S if pool.request_timeout_s is None else 0.0,
        total_timeout_s=6 * request,
        probe_timeout_s=probe,
        probe_every_s=min(10.0, probe),
        pool_down_timeout_s=or_else(pool.pool_down_timeout_s, POOL_DOWN_TIMEOUT_S),
    )


def python_of(pool: PoolConfig) -> str:
    """The interpreter of the servers' environment."""
    return pool.python or sys.executable


def require_module(pool: PoolConfig, role: str, module: str, variable: str) -> None:
    """A server that is launched with this interpreter needs its package here; its own words would
    be a traceback in a log. Raises ``ConfigError`` that says how another interpreter is named.
    """
    if pool.servers and pool.python is None and find_spec(module) is None:
        raise ConfigError(
            f"engine.{role}.servers={pool.servers}: this Python has no {module}; name one that has, "
            f"{variable}=ENV/bin/python with the +engine presets or engine.{role}.python=ENV/bin/python"
        )


def host_of(pool: PoolConfig) -> str:
    """Where launched servers listen."""
    return pool.host or "127.0.0.1"


def search_path(pool: PoolConfig) -> dict[str, str]:
    """A search path that is meant for this interpreter would shadow the packages of another."""
    return {"PYTHONPATH": ""} if pool.python else {}


def log_folder(folder: Path | None) -> Path:
    """The caller's, or one under the system's temporary folder."""
    return folder or Path(tempfile.gettempdir()) / f"spark-nemo-servers-{os.getpid()}"


def or_else(value: Number | None, default: Number) -> Number:
    """``value`` if it is set."""
    return default if value is None else value
