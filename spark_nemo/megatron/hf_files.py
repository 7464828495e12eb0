"""Hugging Face model folders on disk: tensors read one by one, folders written atomically."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spark_nemo.config.errors import ConfigError
from spark_nemo.records import derive_seed

from .model_shape import ModelShape

MAX_SHARD_BYTES = 4 << 30
COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")
INDEX = "model.safetensors.index.json"


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a model folder, read from disk when asked for; sharded or not."""

    def __init__(self, folder: str | Path) -> None:
        """Read the index only. ``ConfigError`` when there are no safetensors, or a file is missing or damaged."""
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            self._file_of = json.loads((self.folder / INDEX).read_text())["weight_map"]
        else:
            files = sorted(self.folder.glob("*.safetensors"))
            if not files:
                raise ConfigError(f"model folder {self.folder} has no .safetensors files")
            self._file_of = {}
            for file in files:
                with self._open(file.name) as tensors:
                    self._file_of |= dict.fromkeys(tensors.keys(), file.name)

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._file_of[name]) as tensors:
            try:
                return tensors.get_tensor(name)
            except SafetensorError as error:
                raise ConfigError(f"tensor {name} in {self.folder / self._file_of[name]}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, FileNotFoundError) as error:
            raise ConfigError(f"{self.folder / file} cannot be read: {error}") from error


class RandomTensors(Mapping[str, Tensor]):
    """Initial weights that depend on the seed and the tensor's name only, so not on the parallel layout.

    Matrices are normal with ``initializer_range``, the two projections back into the residual stream divided by
    sqrt(2 x layers) (GPT-2); norms are 1, biases 0.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], shape: ModelShape, seed: int) -> None:
        self.shapes, self.shape, self.seed = shapes, shape, seed

    def __getitem__(self, name: str) -> Tensor:
        size = self.shapes[name]
        if len(size) == 1:
            return torch.zeros(size) if name.endswith("bias") else torch.ones(size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, name))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = self.shape.init_std / (math.sqrt(2 * self.shape.num_layers) if residual else 1)
        return torch.randn(size, generator=generator) * std

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder that replaces ``target`` on success and disappears on failure."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    temporary.chmod(0o755)  # mkdtemp makes it private
    try:
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename a finished folder into place after flushing its files; a folder already there is moved away first."""
    for path in temporary.rglob("*"):
        if path.is_file():
            _flush(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_model_files(folder: Path, hf_config: dict[str, Any], dtype: torch.dtype, source_dir: Path | None) -> None:
    """config.json with the stored dtype, and the tokenizer and generation files of ``source_dir``."""
    if source_dir is not None:
        for path in Path(source_dir).iterdir():
            if path.is_file() and path.suffix in COPIED_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copy(path, folder / path.name)
    config = {key: value for key, value in hf_config.items() if key not in ("dtype", "torch_dtype")}
    key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
    (folder / "config.json").write_text(json.dumps({**config, key: str(dtype).removeprefix("torch.")}, indent=2))


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]],
                  dtype: torch.dtype, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write safetensors files of at most ``max_bytes``, holding one file's tensors in memory at a time."""
    file_of = _plan_files(shapes, dtype.itemsize, max_bytes)
    waiting: dict[str, Tensor] = {}
    left = {file: list(file_of.values()).count(file) for file in set(file_of.values())}
    for name, tensor in tensors:
        waiting[name] = tensor.to("cpu", dtype, copy=True)
        left[file_of[name]] -= 1
        if left[file_of[name]] == 0:
            save_file(waiting, folder / file_of[name], metadata={"format": "pt"})
            waiting = {}
    if len(left) > 1:
        total = sum(math.prod(size) for size in shapes.values()) * dtype.itemsize
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": file_of}, indent=2))


def _plan_files(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> dict[str, str]:
    numbers, number, used = {}, 1, 0
    for name, size in shapes.items():
        num_bytes = math.prod(size) * itemsize
        if used and used + num_bytes > max_bytes:
            number, used = number + 1, 0
        numbers[name], used = number, used + num_bytes
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
