"""Hugging Face model folders on disk: tensors read and written one by one, folders written
atomically.

A folder may come from a stranger. Its weights are safetensors, which hold nothing that could run;
its index may not point out of it; its Python files are neither run nor copied.
"""

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
from torch import Tensor

from spark_nemo.config.errors import ConfigError
from spark_nemo.records import derive_seed

from .model_shape import ModelShape, check_fetched

MAX_SHARD_BYTES = 4 << 30
COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
TEMPLATES = "additional_chat_templates"
INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_OTHER_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a model folder, read from disk when asked for; sharded or not."""

    def __init__(self, folder: str | Path) -> None:
        """Read the index only. ``ConfigError`` when there are no safetensors, or a file is missing
        or damaged.
        """
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            self._file_of = _read_index(self.folder)
        else:
            files = sorted(self.folder.glob("*.safetensors"))
            if not files:
                raise ConfigError(f"model folder {self.folder} has no .safetensors files")
            self._file_of = {}
            for file in files:
                with self._open(file.name) as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                        if name in self._file_of:
                            raise ConfigError(
                                f"tensor {name} is in {self.folder / self._file_of[name]} and in {file}"
                            )
                        self._file_of[name] = file.name

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._file_of[name]) as tensors:
            try:
                return tensors.get_tensor(name)
            except SafetensorError as error:
                raise ConfigError(
                    f"tensor {name} in {self.folder / self._file_of[name]}: {error}"
                ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    @property
    def files(self) -> list[str]:
        """Names of the files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def describe(self, of_any_type: bool = False) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, from the headers of all files. ``ConfigError`` names a
        damaged file, or a tensor that is not where the index says, that the index forgot, or,
        unless ``of_any_type``, that is not a floating-point number of at least 16 bits.
        """
        known = {**_DTYPES, **_OTHER_DTYPES} if of_any_type else _DTYPES
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in self.files:
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if self._file_of.get(name) != file:
                        raise ConfigError(
                            f"{self.folder / file} has tensor {name}, which {INDEX} "
                            + (
                                "does not list"
                                if name not in self._file_of
                                else f"puts into {self._file_of[name]}"
                            )
                        )
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in known:
                        raise ConfigError(
                            f"tensor {name} in {self.folder / file} has dtype {part.get_dtype()}, "
                            f"weights are one of {', '.join(known)}"
                        )
                    found[name] = (tuple(part.get_shape()), known[part.get_dtype()])
        if missing := sorted(set(self._file_of) - set(found)):
            raise ConfigError(
                f"{INDEX} of {self.folder} puts tensor {missing[0]} into {self._file_of[missing[0]]}, "
                "which does not have it"
            )
        return {name: found[name] for name in self._file_of}

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        check_inside(self.folder / file, self.folder)
        if not (self.folder / file).exists():
            raise ConfigError(
                f"{self.folder / file} is missing, though {INDEX} names it: fetch or copy it again"
            )
        check_fetched(self.folder / file)
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.folder / file} cannot be read: {error}") from error


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        file_of = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    if not isinstance(file_of, dict) or not file_of:
        raise ConfigError(f"{path}: weight_map names no tensors")
    for name, file in file_of.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ConfigError(
                f"{path} puts tensor {name} into {file!r}: only .safetensors files of the same folder "
                "are read"
            )
    return file_of


def check_inside(path: Path, folder: Path) -> None:
    """``ConfigError`` when ``path`` is a link out of ``folder``; those into a Hugging Face cache's
    blobs are fine.
    """
    allowed = (folder.resolve(), (folder / ".." / ".." / "blobs").resolve())
    if path.is_symlink() and path.resolve().parent not in allowed:
        raise ConfigError(
            f"{path} is a link to {path.resolve()}, outside its folder: copy the file there"
        )


class RandomTensors(Mapping[str, Tensor]):
    """Initial weights that depend on the seed and the tensor's name only, so not on the parallel
    layout.

    Matrices are normal with ``initializer_range``, the two projections back into the residual
    stream divided by sqrt(2 x layers) (GPT-2); norms are 1, biases 0.
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
    """Rename a finished folder into place after flushing its files; a folder already there is moved
    away first.
    """
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


def write_model_files(
    folder: Path, hf_config: dict[str, Any], dtype: torch.dtype, source_dir: Path | None
) -> None:
    """config.json with the stored dtype, and the tokenizer and generation files of ``source_dir``.

    Python files and what names them (``auto_map``) stay behind: a checkpoint's own code is never
    run, nor passed on.
    """
    if source_dir is not None:
        copy_companions(Path(source_dir), folder)
    left_out = ("dtype", "torch_dtype", "auto_map")
    config = {key: value for key, value in hf_config.items() if key not in left_out}
    key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
    (folder / "config.json").write_text(
        json.dumps({**config, key: str(dtype).removeprefix("torch.")}, indent=2)
    )


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and configuration files, and the templates that transformers keeps
    in a folder of their own. ``ConfigError`` for a link out of ``source``.
    """
    for path in sorted((source / TEMPLATES).glob("*.jinja")):
        check_inside(path, source)
        (target / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / TEMPLATES / path.name)
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and path.suffix in COPIED_SUFFIXES
            and not path.name.endswith(".index.json")
        ):
            check_inside(path, source)
            shutil.copyfile(path, target / path.name)


class SafetensorsWriter:
    """One safetensors file, written tensor by tensor in any order; it gets its name when the last
    one is there.

    The format is an 8-byte length, a JSON header with the place of every tensor, and their bytes
    (https://github.com/huggingface/safetensors#format). The library writes whole files from memory
    only.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self.dtype, self._left = path, dtype, set(shapes)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._start, end = {}, 0
        for name, size in shapes.items():
            begin, end = end, end + math.prod(size) * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(size),
                "data_offsets": [begin, end],
            }
            self._start[name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the bytes of the tensors are aligned
        self._temporary = path.with_name(path.name + ".part")
        self._stream = self._temporary.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._data = 8 + len(text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Copy ``tensor`` into its place."""
        values = tensor.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
        self._stream.seek(self._data + self._start[name])
        self._stream.write(values.numpy().data)
        self._left.discard(name)
        if not self._left:
            self._stream.close()
            _flush(self._temporary)
            os.rename(self._temporary, self.path)


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors files of at most ``max_bytes`` and their index, holding one tensor in
    memory at a time.

    Files that an earlier, interrupted call has finished in ``folder`` are kept.
    """
    file_of = plan_files(shapes, dtype.itemsize, max_bytes)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, file in file_of.items():
        files.setdefault(file, {})[name] = shapes[name]
    writers: dict[str, SafetensorsWriter] = {}
    for name, tensor in tensors:
        file = file_of[name]
        if file not in writers and (folder / file).exists():
            continue
        if file not in writers:
            writers[file] = SafetensorsWriter(folder / file, files[file], dtype)
        writers[file].write(name, tensor)
    if len(files) > 1:
        total = sum(math.prod(size) for size in shapes.values()) * dtype.itemsize
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": file_of}, indent=2)
        )


def plan_files(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> dict[str, str]:
    """The file of every tensor, by transformers' naming."""
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
