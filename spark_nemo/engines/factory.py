"""From configuration to a running engine."""

from __future__ import annotations

from pathlib import Path

from ..config import ConfigError, EngineConfig
from .base import Engine
from .local import LocalEngine


def build_engine(config: EngineConfig, model_dir: Path | str) -> Engine:
    """The engine ``config.kind`` names, serving ``model_dir`` as weight version 0.

    Raises ``EngineFailure`` when the folder cannot be served.
    """
    if config.kind == "local":
        return LocalEngine.from_folder(
            model_dir, max_batch_size=config.max_batch_size, max_context=config.max_context)
    raise ConfigError(f"engine.kind={config.kind!r}: no such engine")
