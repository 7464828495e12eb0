"""A pool of SGLang servers from its configuration, with a router or without."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from spark_nemo.config import EngineConfig
from spark_nemo.models.hf_config import read_token_limits

from .. import server_wrapper
from ..fleet import Fleet
from ..fleet.pool import (
    CLIENT_SLACK,
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
"""Tokens of its context length that SGLang keeps for itself: it serves so many fewer."""


class CheckedServer(SglangServer):
    """Passes its first probe only when the server's context is as long as we believe (a shorter one
    cuts samples) and its own warm-up is over: it generates before, but says 503 on ``/health``
    until its warm-up request, which then queues behind ours, has ended; to a fleet that asks, a
    server full of long prompts would look dead.
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
    """The pool of ``role``, serving ``model_dir`` as weight version 0. Launched servers are
    starting when it returns.

    Raises ``ConfigError`` when the pool is not configured or there is no SGLang to launch,
    ``EngineFailure`` when its interpreter does not exist.
    """
    config.require(role)
    pool = config.pool(role)
    vocab_size, max_positions = read_token_limits(model_dir)
    require_module(pool, role, "sglang", "SPARK_SGLANG_PYTHON")
    max_context = min(config.max_context, max_positions - CONTEXT_RESERVE)
    limits = pool_limits(pool)
    key = os.environ.get(server_wrapper.KEY_VARIABLE) if pool.urls else secrets.token_urlsafe(32)

    def connect(url: str, servers: int = 1) -> CheckedServer:
        return CheckedServer(
            url,
            api_key=key,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=connections_per_server(config) * servers,
            control_timeout_s=limits.control_timeout_s,
            request_timeout_s=CLIENT_SLACK * limits.request_timeout_s,
            token_timeout_s=CLIENT_SLACK * limits.token_timeout_s,
        )

    def command(index: int, host: str, port: int) -> list[str]:
        parallel = or_else(pool.tensor_parallel, 1)
        words = [
            python_of(pool),
            server_wrapper.__file__,
            "server",
            "--model-path",
            str(model_dir.resolve()),
            "--tp-size",
            str(parallel),
            "--weight-version",
            "0",
            "--context-length",
            str(max_context + CONTEXT_RESERVE),
            "--max-running-requests",
            str(config.max_batch_size),
            "--host",
            host,
            "--port",
            str(port),
        ]
        if pool.first_gpu is not None:
            words += ["--base-gpu-id", str(pool.first_gpu + index * parallel)]
        return [*words, *pool.server_args]

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
            request_timeout_s=CLIENT_SLACK * limits.deadlines(max_context)[0],
        )
    return build_fleet(
        config,
        role,
        connect,
        LaunchSpec(command, {server_wrapper.KEY_VARIABLE: key or ""}),
        log_dir,
        router,
    )
