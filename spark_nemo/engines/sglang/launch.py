"""Build a pool of SGLang servers from its configuration, with or without a router."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from spark_nemo.config import EngineConfig, PoolConfig
from spark_nemo.models.hf_config import read_token_limits

from .. import server_wrapper
from ..fleet import Fleet
from ..fleet.pool import (
    LaunchSpec,
    build_fleet,
    connections_per_server,
    host_of,
    log_folder,
    or_else,
    pool_limits,
    python_of,
    require_module,
    search_path,
)
from .router import RouterProcess
from .server import SglangServer

CONTEXT_RESERVE = 6
"""Tokens of its context length that SGLang keeps for itself."""
ROUTER_SLACK = 1.5
"""The router's deadline over the fleet's, which knows of pauses and must come first."""


class CheckedServer(SglangServer):
    """A client whose first probe also checks the server's context and the end of its warm-up.

    A server with a shorter context cuts samples. During its warm-up a server generates already, but
    ``/health`` is 503 until its warm-up request, which would queue behind ours, has ended. A fleet
    would take such a server, full of long prompts, for dead.
    """

    _checked = False

    async def probe(self, timeout_s: float) -> None:
        """See ``SglangServer.probe``."""
        await super().probe(timeout_s)
        if not self._checked:
            await self.check_limits()
            await self._call("GET", "/health", timeout_s=timeout_s)
            self._checked = True


def build_pool(
    config: EngineConfig, model_dir: Path, role: str, log_dir: Path | None = None
) -> Fleet:
    """Return the pool of ``role`` with ``model_dir`` as weight version 0; servers are starting.

    Raises ``ConfigError`` when the pool is not configured or SGLang is not installed,
    ``EngineFailure`` when its interpreter does not exist.
    """
    config.require(role)
    pool = config.pool(role)
    vocab_size, max_positions = read_token_limits(model_dir)
    require_module(pool, role, "sglang", "SPARK_SGLANG_PYTHON")
    max_context = min(config.max_context, max_positions - CONTEXT_RESERVE)
    limits = pool_limits(pool)
    if pool.urls:
        key = os.environ.get(server_wrapper.KEY_VARIABLE)
    else:
        key = secrets.token_urlsafe(32)

    def connect(url: str, servers: int = 1) -> CheckedServer:
        return CheckedServer(
            url,
            api_key=key,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=connections_per_server(config) * servers,
            request_timeout_s=None,  # the fleet's clock has the deadline
            control_timeout_s=limits.control_timeout_s,
        )

    def command(index: int, host: str, port: int) -> list[str]:
        return server_command(
            pool,
            model_dir,
            index=index,
            host=host,
            port=port,
            context_length=max_context + CONTEXT_RESERVE,
            max_running_requests=config.max_batch_size,
        )

    router = None
    if pool.router:
        router = RouterProcess(
            f"{role} router",
            lambda url: connect(url, config.num_engines(role)),
            python=python_of(pool),
            host=host_of(pool),
            key=key,
            log_path=log_folder(log_dir) / f"{role}-router.log",
            environment=search_path(pool),
            max_restarts=or_else(pool.max_restarts, 3),
            request_timeout_s=ROUTER_SLACK * limits.deadlines(max_context)[0],
        )
    environment = {server_wrapper.KEY_VARIABLE: key or ""}
    return build_fleet(config, role, connect, LaunchSpec(command, environment), log_dir, router)


def server_command(
    pool: PoolConfig,
    model_dir: Path,
    *,
    index: int,
    host: str,
    port: int,
    context_length: int,
    max_running_requests: int,
) -> list[str]:
    """Return the command line of server number ``index`` of the pool."""
    tensor_parallel = or_else(pool.tensor_parallel, 1)
    command = [
        python_of(pool),
        server_wrapper.__file__,
        "server",
        "--model-path",
        str(model_dir.resolve()),
        "--tp-size",
        str(tensor_parallel),
        "--weight-version",
        "0",
        "--context-length",
        str(context_length),
        "--max-running-requests",
        str(max_running_requests),
        "--host",
        host,
        "--port",
        str(port),
    ]
    if pool.first_gpu is not None:
        command += ["--base-gpu-id", str(pool.first_gpu + index * tensor_parallel)]
    return [*command, *pool.server_args]
