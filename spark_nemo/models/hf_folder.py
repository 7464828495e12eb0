"""Files of a Hugging Face model folder: check, copy and write them.

A folder may be untrusted. Its index must not name files outside it, and its Python files are
neither run nor copied.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError

WEIGHT_INDEX = "model.safetensors.index.json"
_COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
_TEMPLATE_FOLDER = "additional_chat_templates"


def read_weight_index(folder: Path) -> dict[str, str]:
    """Return the file of every tensor. Raises ``ConfigError`` for a damaged or unsafe index."""
    path = folder / WEIGHT_INDEX
    try:
        file_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    if not isinstance(file_of, dict) or not file_of:
        raise ConfigError(f"{path}: weight_map names no tensors")
    for name, file in file_of.items():
        is_safe = isinstance(file, str) and Path(file).name == file
        if not is_safe or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{path} puts tensor {name} into {file!r}: only .safetensors files of the same folder "
                "are read"
            )
    return file_of


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: those the index names, else all."""
    if (folder / WEIGHT_INDEX).is_file():
        return [folder / name for name in sorted(set(read_weight_index(folder).values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model folder {folder} has no .safetensors files")
    return files


def check_weight_file(path: Path) -> None:
    """Raise ``ConfigError`` if ``path`` is missing, a link out of its folder or a Git LFS pointer."""
    check_inside(path, path.parent)
    if not path.exists():
        raise ConfigError(
            f"{path} is missing, though {WEIGHT_INDEX} names it: fetch or copy it again"
        )
    check_fetched(path)


def check_fetched(path: Path) -> None:
    """Raise ``ConfigError`` if ``path`` is a Git LFS pointer instead of the file."""
    with path.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise ConfigError(
                f"{path} is a Git LFS pointer, not the file: git lfs pull in its folder, or hf download"
            )


def check_inside(path: Path, folder: Path) -> None:
    """Raise ``ConfigError`` if ``path`` is a link out of ``folder``."""
    # In a Hugging Face cache, files are links into ../../blobs.
    allowed = (folder.resolve(), (folder / ".." / ".." / "blobs").resolve())
    if path.is_symlink() and path.resolve().parent not in allowed:
        raise ConfigError(
            f"{path} is a link to {path.resolve()}, outside its folder: copy the file there"
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and configuration files. Raises ``ConfigError`` for unsafe links."""
    # transformers keeps additional chat templates in a folder of their own.
    for path in sorted((source / _TEMPLATE_FOLDER).glob("*.jinja")):
        check_inside(path, source)
        (target / _TEMPLATE_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, target / _TEMPLATE_FOLDER / path.name)
    for path in sorted(source.iterdir()):
        is_companion = path.is_file() and path.suffix in _COPIED_SUFFIXES
        if is_companion and not path.name.endswith(".index.json"):
            check_inside(path, source)
            shutil.copyfile(path, target / path.name)


def write_model_files(
    folder: Path, hf_config: dict[str, Any], dtype: str, source_dir: Path | None
) -> None:
    """Write config.json with ``dtype``, and copy tokenizer and generation files of ``source_dir``.

    Python files and the setting that names them (``auto_map``) are left out: a checkpoint's own code
    is never run nor passed on.
    """
    if source_dir is not None:
        copy_companions(Path(source_dir), folder)
    left_out = ("dtype", "torch_dtype", "auto_map")
    config = {key: value for key, value in hf_config.items() if key not in left_out}
    # transformers 4 reads torch_dtype, 5 dtype: keep the key that the model came with.
    dtype_key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
    config[dtype_key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2))
