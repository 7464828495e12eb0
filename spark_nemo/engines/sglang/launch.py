"""A pool of SGLang servers from its configuration: launched here, or given by URL; with a router or without."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from spark_nemo.config import EngineConfig, PoolConfig

from ..base import Engine
from ..fleet import Fleet, FleetLimits, Keeper
from ..fleet.process import ServerProcess
from ..model_files import model_numbers
from . import serve
from .router import RouterProcess
from .server import SglangServer

Number = TypeVar("Number", int, float)
CONTEXT_RESERVE = 6
"""Tokens of its context length that SGLang keeps for itself: it serves so many fewer."""
_OVER_LIMIT = 1.5
"""A client's deadline over the fleet's, so that the fleet's, which knows of pauses, comes first."""


class CheckedServer(SglangServer):
    """Passes its first probe only when the server's context is as long as we believe: a shorter one cuts samples."""

    _checked = False

    async def probe(self, timeout_s: float) -> None:
        """See ``SglangServer.probe``."""
        await super().probe(timeout_s)
        if not self._checked:
            await self.check_limits()
            self._checked = True


def build_pool(config: EngineConfig, model_dir: Path, role: str, log_dir: Path | None = None) -> Fleet:
    """The pool of ``role``, serving ``model_dir`` as weight version 0. Launched servers are starting when it returns.

    Raises ``ConfigError`` when the pool is not configured, ``EngineFailure`` when its interpreter does not exist.
    """
    config.require(role)
    pool, numbers = config.pool(role), model_numbers(model_dir)
    max_context = min(config.max_context, numbers.max_positions - CONTEXT_RESERVE)
    limits = pool_limits(pool)
    key = os.environ.get(serve.KEY_VARIABLE) if pool.urls else secrets.token_urlsafe(32)

    def connect(url: str, servers: int = 1) -> CheckedServer:
        return CheckedServer(
            url, api_key=key, vocab_size=numbers.vocab_size, max_context=max_context,
            # As many again wait at the server, so that none of its slots is idle for a round trip.
            max_in_flight=2 * config.max_batch_size * servers, control_timeout_s=limits.control_timeout_s,
            request_timeout_s=_OVER_LIMIT * limits.request_timeout_s)

    front = None
    if pool.router:
        front = RouterProcess(
            f"{role} router", lambda url: connect(url, config.num_engines(role)), python=pool.python or sys.executable,
            host=pool.host or "127.0.0.1", key=key, log_path=_log_dir(log_dir) / f"{role}-router.log",
            environment=_search_path(pool), max_restarts=_or(pool.max_restarts, 3))
    members: dict[str, Engine | Keeper] = {}
    if pool.urls:
        members = {url: connect(url) for url in pool.urls}
    else:
        processes = [_process(config, role, index, Path(model_dir), max_context, key, connect, _log_dir(log_dir))
                     for index in range(pool.servers or 0)]
        for process in processes:
            process.launch()
        members = {process.name: process for process in processes}
    return Fleet(members, limits, name=f"{role} pool", front=front)


def pool_limits(pool: PoolConfig) -> FleetLimits:
    """The fleet's bounds that the configuration sets."""
    request = _or(pool.request_timeout_s, 600.0)
    probe = _or(pool.probe_timeout_s, 30.0)
    return FleetLimits(
        request_timeout_s=request, total_timeout_s=6 * request, probe_timeout_s=probe, probe_every_s=min(10.0, probe),
        lost_timeout_s=_or(pool.lost_timeout_s, 120.0))


def _process(config: EngineConfig, role: str, index: int, model_dir: Path, max_context: int, key: str | None,
             connect: Callable[[str], SglangServer], log_dir: Path) -> ServerProcess:
    pool = config.pool(role)
    python, parallel = pool.python or sys.executable, _or(pool.tensor_parallel, 1)
    fixed = ["--model-path", str(model_dir.resolve()), "--tp-size", str(parallel), "--weight-version", "0",
             "--context-length", str(max_context + CONTEXT_RESERVE),
             "--max-running-requests", str(config.max_batch_size)]
    if pool.first_gpu is not None:
        fixed += ["--base-gpu-id", str(pool.first_gpu + index * parallel)]
    return ServerProcess(
        f"{role}-{index}",
        lambda host, port: [python, serve.__file__, "server", *fixed, "--host", host, "--port", str(port),
                            *pool.server_args],
        connect, log_path=log_dir / f"{role}-{index}.log",
        environment={**_search_path(pool), **pool.server_env, serve.KEY_VARIABLE: key or ""},
        host=pool.host or "127.0.0.1", start_timeout_s=_or(pool.start_timeout_s, 900.0),
        max_restarts=_or(pool.max_restarts, 3))


def _search_path(pool: PoolConfig) -> dict[str, str]:
    """A search path that is meant for this interpreter would shadow the packages of another."""
    return {"PYTHONPATH": ""} if pool.python else {}


def _log_dir(folder: Path | None) -> Path:
    return folder or Path(tempfile.gettempdir()) / f"spark-nemo-servers-{os.getpid()}"


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
