"""Build an engine from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spark_nemo.config import EngineConfig

from .base import Engine
from .local import LocalEngine

Build = Callable[[EngineConfig, Path, str, Path | None], Engine]


def _local(config: EngineConfig, model_dir: Path, role: str, log_dir: Path | None) -> Engine:
    return LocalEngine.from_folder(
        model_dir, max_batch_size=config.max_batch_size, max_context=config.max_context
    )


def _sglang(config: EngineConfig, model_dir: Path, role: str, log_dir: Path | None) -> Engine:
    from .sglang.launch import build_pool

    return build_pool(config, model_dir, role, log_dir)


def _vllm(config: EngineConfig, model_dir: Path, role: str, log_dir: Path | None) -> Engine:
    from .vllm.pool import build_pool

    return build_pool(config, model_dir, role, log_dir)


KINDS: dict[str, Build] = {"local": _local, "sglang": _sglang, "vllm": _vllm}


def build_engine(
    config: EngineConfig, model_dir: Path | str, role: str, log_dir: Path | None = None
) -> Engine:
    """Return the engine of kind ``config.kind`` for ``role`` (``policy`` or ``verifier``).

    It serves ``model_dir`` as weight version 0 and is embedded or a ``Fleet`` of the role's
    servers, whose logs go to ``log_dir``.

    Raises ``EngineFailure`` when the folder cannot be served, ``ConfigError`` when the role has no
    engines.
    """
    config.pool(role)
    return KINDS[config.kind](config, Path(model_dir), role, log_dir)
