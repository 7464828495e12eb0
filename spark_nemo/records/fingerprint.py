"""Fingerprints: what a result was made from, to resume with the same inputs or not at all.

A fingerprint is a dict from dotted setting names to JSON values. The setting's value is replaced
by a digest of the content where it names a file, a model folder or a record store: a file that
was moved is the same, a file that was edited is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from spark_nemo.config import ConfigError

from .shards import shard_paths

_SAMPLED_BYTES = 1 << 20
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_UNSET = "<not set>"


def settings_fingerprint(config: object, names: Sequence[str]) -> dict[str, object]:
    """Return the fingerprint of the settings ``names`` of ``config``.

    A name is a dotted path; the name of a section means every setting in it. Settings that
    name a file, a model folder or a record store count by their content.
    """
    fingerprint: dict[str, object] = {}
    for name in names:
        for setting, value in flatten_settings(attrgetter(name)(config), name):
            fingerprint[setting] = _with_content(value)
    return fingerprint


def check_same_fingerprint(
    stored: Mapping[str, object], current: Mapping[str, object], where: Path | str
) -> None:
    """Raise ``ConfigError`` that names the first setting in which the two fingerprints differ.

    ``where`` names the result that was made with ``stored``. Both are compared as JSON and by
    single settings: a tuple equals a list, and a section is compared setting by setting.
    """
    before = dict(_flatten(_as_json(stored), ""))
    now = dict(_flatten(_as_json(current), ""))
    for name in [*now, *(name for name in before if name not in now)]:
        old = before.get(name, _UNSET)
        new = now.get(name, _UNSET)
        if old != new:
            raise ConfigError(
                f"{name}={new}: {where} was made with {name}={old}; use the same settings or "
                "another run.dir"
            )


def flatten_settings(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield ``(dotted name, value)`` for each setting below a configuration section or a value."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    yield from _flatten(value, name)


def model_fingerprint(folder: str | Path) -> str:
    """Return 12 hex digits from a model folder's configuration, tokenizer and weight files.

    Of each file the size, the first and the last MiB count. Reading a 140 GB checkpoint to its end
    would cost minutes at every start. Two checkpoints of one training run differ in every block,
    so the ends tell them apart.
    """
    folder = Path(folder)
    files = [folder / name for name in _MODEL_FILES] + sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        if not path.exists():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"model folder {folder}: config.json is missing; name a Hugging Face model folder "
            "(hub names are not downloaded: hf download NAME --local-dir FOLDER)"
        )
    return digest.hexdigest()[:12]


def content_fingerprint(path: str | Path) -> str | None:
    """Return a digest of the file, model folder or record store at ``path``; None otherwise.

    A record store counts by the names and sizes of its files: they are only appended to.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return f"file {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    if (path / "config.json").is_file():
        return f"model {model_fingerprint(path)}"
    if shards := shard_paths(path):
        sizes = json.dumps([[shard.name, shard.stat().st_size] for shard in shards])
        return f"store {hashlib.sha256(sizes.encode()).hexdigest()[:16]}"
    return None


def _with_content(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_with_content(each) for each in value]
    if isinstance(value, str) and value:
        return content_fingerprint(value) or value
    return value


def _flatten(value: object, name: str) -> Iterator[tuple[str, object]]:
    # An empty section is a value of its own: dropping it would hide that it is there.
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _as_json(fingerprint: Mapping[str, object]) -> Any:
    return json.loads(json.dumps(fingerprint, default=str))
