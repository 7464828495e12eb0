"""Build a pool of vLLM servers from its configuration."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from spark_nemo.config import ConfigError, EngineConfig
from spark_nemo.models.hf_config import read_token_limits

from .. import server_wrapper
from ..fleet import Fleet
from ..fleet.pool import (
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
    """A client whose first probe also checks model name, context and log-probabilities."""

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
    """Return the pool of ``role``; given servers need ``--served-model-name`` set to the role.

    Raises ``ConfigError`` when the pool is not configured, ``EngineFailure`` when its interpreter
    does not exist.
    """
    config.require(role)
    pool = config.pool(role)
    vocab_size, max_positions = read_token_limits(model_dir)
    if pool.first_gpu is not None:
        raise ConfigError(
            f"engine.{role}.first_gpu={pool.first_gpu}: a vLLM server takes its GPUs from "
            f"CUDA_VISIBLE_DEVICES; set engine.{role}.server_env"
        )
    require_module(pool, role, "vllm", "SPARK_VLLM_PYTHON")
    max_context = min(config.max_context, max_positions)
    if pool.urls:
        key = os.environ.get(server_wrapper.KEY_VARIABLE)
    else:
        key = secrets.token_urlsafe(32)

    def connect(url: str) -> VllmServer:
        return CheckedServer(
            url,
            api_key=key,
            served_name=role,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=connections_per_server(config),
            request_timeout_s=None,  # the fleet's clock has the deadline
            control_timeout_s=pool_limits(pool).control_timeout_s,
        )

    def command(index: int, host: str, port: int) -> list[str]:
        python = python_of(pool)
        tensor_parallel = str(or_else(pool.tensor_parallel, 1))
        server = server_command(
            python,
            model_dir.resolve(),
            port=port,
            served_name=role,
            max_context=max_context,
            host=host,
            max_batch_size=config.max_batch_size,
            extra=("--tensor-parallel-size", tensor_parallel, *pool.server_args),
        )
        return [python, server_wrapper.__file__, "exec", *server]

    return build_fleet(
        config, role, connect, LaunchSpec(command, server_environment({}, key)), log_dir
    )
