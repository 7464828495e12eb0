"""Read a Hugging Face model folder's config.json and its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """Return the config.json of a model folder. Raises ``ConfigError`` if it cannot be read."""
    folder = Path(folder)
    if folder.is_file():
        raise ConfigError(f"model folder {folder} is a file: name its folder")
    if not folder.is_dir():
        raise ConfigError(
            f"model folder {folder} does not exist (hub names are not downloaded: "
            "hf download NAME --local-dir FOLDER)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"model folder {folder} has no config.json: name a Hugging Face model folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ConfigError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not a model's settings")
    return config


def require(config: Mapping[str, Any], key: str, source: str) -> Any:
    """Return ``config[key]``. Raises ``ConfigError`` if it is missing or null."""
    if config.get(key) is None:
        raise ConfigError(f"{source} has no {key!r}: is this a Hugging Face language model?")
    return config[key]


def positive_int(
    config: Mapping[str, Any], key: str, source: str, default: int | None = None
) -> int:
    """Return the positive integer ``config[key]``. Without ``default`` the key is required."""
    if default is not None and config.get(key) is None:
        return default
    value = require(config, key, source)
    # bool is a subclass of int: "vocab_size": true would pass as 1.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{source}: {key}={value!r} must be a positive whole number")
    return value


def positive_float(
    config: Mapping[str, Any], key: str, source: str, default: float, *, zero_allowed: bool = False
) -> float:
    """Return the finite positive number ``config[key]``, or ``default`` if it is missing."""
    value = config.get(key)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ConfigError(f"{source}: {key}={value!r} must be a positive number")
    return float(value)


def read_token_limits(folder: str | Path) -> tuple[int, int]:
    """Return a model's vocabulary size and longest context, of any family that an engine serves."""
    config = read_hf_config(folder)
    source = f"{folder}/config.json"
    return (
        positive_int(config, "vocab_size", source),
        positive_int(config, "max_position_embeddings", source),
    )
