"""A pool of vLLM servers from its configuration."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from spark_nemo.config import ConfigError, EngineConfig
from spark_nemo.models.hf_config import read_token_limits

from .. import server_wrapper
from ..fleet import Fleet
from ..fleet.pool import (
    CLIENT_SLACK,
    LaunchSpec,
    build_fleet,
    connections_per_server,
    or_else,
    pool_limits,
    python_of,
    require_module,
)
from .launch import server_command, server_environment
from .server import VllmServer


class CheckedServer(VllmServer):
    """Passes its first probe only when the server serves the model by our name, with our context
    and log-probabilities that mean what ours mean.
    """

    _checked = False

    async def probe(self, timeout_s: float) -> None:
        """See ``VllmServer.probe``."""
        await super().probe(timeout_s)
        if not self._checked:
            await self.check_limits()
            await self.check_logprobs_mode()
            self._checked = True


def build_pool(
    config: EngineConfig, model_dir: Path, role: str, log_dir: Path | None = None
) -> Fleet:
    """The pool of ``role``; given servers must run with ``--served-model-name`` set to the role.

    Raises ``ConfigError`` when the pool is not configured, ``EngineFailure`` when its interpreter
    does not exist.
    """
    config.require(role)
    pool = config.pool(role)
    vocab_size, max_positions = read_token_limits(model_dir)
    max_context = min(config.max_context, max_positions)
    limits = pool_limits(pool)
    key = os.environ.get(server_wrapper.KEY_VARIABLE) if pool.urls else secrets.token_urlsafe(32)
    if pool.first_gpu is not None:
        raise ConfigError(
            f"engine.{role}.first_gpu={pool.first_gpu}: a vLLM server takes its GPUs from "
            f"CUDA_VISIBLE_DEVICES; set engine.{role}.server_env"
        )
    require_module(pool, role, "vllm", "SPARK_VLLM_PYTHON")

    def connect(url: str) -> VllmServer:
        return CheckedServer(
            url,
            api_key=key,
            served_name=role,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=connections_per_server(config),
            control_timeout_s=limits.control_timeout_s,
            request_timeout_s=CLIENT_SLACK * limits.request_timeout_s,
            token_timeout_s=CLIENT_SLACK * limits.token_timeout_s,
        )

    def command(index: int, host: str, port: int) -> list[str]:
        python = python_of(pool)
        # Through server_wrapper.py, which makes the server die with us.
        return [
            python,
            server_wrapper.__file__,
            "exec",
            *server_command(
                python,
                model_dir.resolve(),
                port=port,
                served_name=role,
                max_context=max_context,
                host=host,
                max_batch_size=config.max_batch_size,
                extra=(
                    "--tensor-parallel-size",
                    str(or_else(pool.tensor_parallel, 1)),
                    *pool.server_args,
                ),
            ),
        ]

    return build_fleet(
        config, role, connect, LaunchSpec(command, server_environment({}, key)), log_dir
    )
