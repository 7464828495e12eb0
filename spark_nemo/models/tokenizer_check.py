"""Check that tokenizer and embedding fit together, without a tokenizer library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError

from .hf_folder import check_fetched
from .spec import ModelSpec


def check_tokenizer(folder: str | Path, spec: ModelSpec) -> None:
    """Raise ``ConfigError`` if a token of tokenizer.json has an id without an embedding row.

    Rows without a token are common (Qwen and Llama round the vocabulary up) and allowed, as is a
    folder without tokenizer.json.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return
    check_fetched(path)
    highest_token, highest_id = "", -1
    try:
        for token, token_id in _tokens(json.loads(path.read_text())):
            if token_id > highest_id:
                highest_token, highest_id = token, token_id
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a tokenizer: {error}") from error
    if highest_id >= spec.vocab_size:
        raise ConfigError(
            f"{path} has token {highest_token!r} with id {highest_id}, but tensor "
            f"model.embed_tokens.weight has {spec.vocab_size} rows (vocab_size in config.json): "
            "enlarge the embedding, or use the model's own tokenizer"
        )


def _tokens(tokenizer: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield every token with its id."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:  # Unigram models list (token, score); the position is the id.
        for index, (token, _) in enumerate(vocabulary):
            yield token, index
    for token in tokenizer.get("added_tokens") or []:
        yield token["content"], token["id"]
