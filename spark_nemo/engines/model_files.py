"""What an engine's client must know of the model in a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import ConfigError


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """Token ids are below ``vocab_size``; ``max_positions`` is the longest context."""

    vocab_size: int
    max_positions: int


def model_numbers(folder: Path | str) -> ModelNumbers:
    """From ``config.json``. Raises ``ConfigError`` naming what is missing."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"model folder {folder}: no config.json there; name a Hugging Face model folder (hub names "
            "are not downloaded: hf download NAME --local-dir FOLDER)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON in UTF-8: {error}") from error
    found = []
    for name in ("vocab_size", "max_position_embeddings"):
        value = config.get(name) if isinstance(config, dict) else None
        if type(value) is not int or value < 1:
            raise ConfigError(f"{path}: {name}={value!r} is not a positive number")
        found.append(value)
    return ModelNumbers(*found)
