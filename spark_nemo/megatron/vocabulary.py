"""Do tokenizer and embedding go together? Read from tokenizer.json alone; no tokenizer library, no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError

from .model_shape import ModelShape, check_fetched


def check_tokenizer(folder: str | Path, shape: ModelShape) -> None:
    """Raise ``ConfigError`` for a token whose id has no row in the embedding; a folder without
    tokenizer.json is fine.

    Rows without a token are common (Qwen and Llama round the vocabulary up) and no error.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return
    check_fetched(path)
    try:
        text, highest = max(
            _tokens(json.loads(path.read_text())), key=lambda token: token[1], default=("", -1)
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no tokenizer: {error}") from error
    if highest >= shape.vocab_size:
        raise ConfigError(
            f"{path} has token {text!r} with id {highest}, but tensor model.embed_tokens.weight has "
            f"{shape.vocab_size} rows (vocab_size in config.json): enlarge the embedding, or use the "
            "model's own tokenizer"
        )


def _tokens(tokenizer: dict[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:  # Unigram: a list of (token, score), whose places are the ids
        yield from ((token, index) for index, (token, _) in enumerate(vocabulary))
    yield from ((token["content"], token["id"]) for token in tokenizer.get("added_tokens") or [])
