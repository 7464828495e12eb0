"""Read and write the tensors of Hugging Face model folders one by one.

A folder may be untrusted: its weights are safetensors, which cannot hold code, and
``models/hf_folder.py`` checks the files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_folder import (
    WEIGHT_INDEX,
    check_weight_file,
    read_weight_index,
    weight_files,
)
from spark_nemo.models.spec import ModelSpec
from spark_nemo.records import derive_seed
from spark_nemo.utils.files import fsync_path

MAX_SHARD_BYTES = 4 << 30
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


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that config.json and servers use, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a model folder in one or more files, read from disk on access."""

    def __init__(self, folder: str | Path) -> None:
        """Read the index only. Raises ``ConfigError`` if a file is missing or damaged."""
        self.folder = Path(folder)
        if (self.folder / WEIGHT_INDEX).is_file():
            self._file_of = read_weight_index(self.folder)
        else:
            self._file_of = self._scan_files()

    def _scan_files(self) -> dict[str, str]:
        file_of: dict[str, str] = {}
        for file in weight_files(self.folder):
            with self._open(file.name) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in file_of:
                        raise ConfigError(
                            f"tensor {name} is in {self.folder / file_of[name]} and in {file}"
                        )
                    file_of[name] = file.name
        return file_of

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

    def describe(self, any_dtype: bool = False) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor, from the files' headers.

        Raises ``ConfigError`` for a damaged file, and for a tensor that is not where the index says,
        that the index does not list or, unless ``any_dtype``, that is not a floating-point number of
        at least 16 bits.
        """
        known = _DTYPES | _OTHER_DTYPES if any_dtype else _DTYPES
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for file in self.files:
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    self._check_indexed(name, file)
                    view = tensors.get_slice(name)
                    if view.get_dtype() not in known:
                        raise ConfigError(
                            f"tensor {name} in {self.folder / file} has dtype {view.get_dtype()}, "
                            f"weights are one of {', '.join(known)}"
                        )
                    found[name] = (tuple(view.get_shape()), known[view.get_dtype()])
        missing = sorted(set(self._file_of) - set(found))
        if missing:
            raise ConfigError(
                f"{WEIGHT_INDEX} of {self.folder} puts tensor {missing[0]} into "
                f"{self._file_of[missing[0]]}, which does not have it"
            )
        return {name: found[name] for name in self._file_of}

    def _check_indexed(self, name: str, file: str) -> None:
        indexed = self._file_of.get(name)
        if indexed is None:
            problem = "does not list"
        elif indexed != file:
            problem = f"puts into {indexed}"
        else:
            return
        raise ConfigError(f"{self.folder / file} has tensor {name}, which {WEIGHT_INDEX} {problem}")

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self.folder / file
        check_weight_file(path)
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error


class RandomTensors(Mapping[str, Tensor]):
    """Initial weights that depend on the seed and the tensor's name, not on the parallel layout.

    Matrices are normal with ``initializer_range``; the two projections into the residual stream are
    divided by sqrt(2 x layers) (GPT-2). Norms are 1, biases 0.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], spec: ModelSpec, seed: int) -> None:
        self.shapes = shapes
        self.spec = spec
        self.seed = seed

    def __getitem__(self, name: str) -> Tensor:
        size = self.shapes[name]
        if len(size) == 1:
            return torch.zeros(size) if name.endswith("bias") else torch.ones(size)
        std = self.spec.init_std
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.spec.num_layers)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, name))
        return torch.randn(size, generator=generator) * std

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class SafetensorsWriter:
    """A safetensors file written tensor by tensor in any order; complete files only get ``path``.

    The format is an 8-byte length, a JSON header with the place of every tensor, and their bytes
    (https://github.com/huggingface/safetensors#format). The library can only write a whole file from
    memory.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path = path
        self.dtype = dtype
        self._missing = set(shapes)
        self._offset: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in shapes.items():
            begin = end
            end += math.prod(size) * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(size),
                "data_offsets": [begin, end],
            }
            self._offset[name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors' bytes must be aligned
        self._data_start = 8 + len(text)
        self._temporary = path.with_name(path.name + ".part")
        self._stream = self._temporary.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Copy ``tensor`` into its place."""
        values = tensor.to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
        self._stream.seek(self._data_start + self._offset[name])
        self._stream.write(values.numpy().data)
        self._missing.discard(name)
        if not self._missing:
            self._stream.close()
            fsync_path(self._temporary)
            os.rename(self._temporary, self.path)

    def close(self) -> None:
        """Close the file; an incomplete one keeps its temporary name."""
        # After a full disk, closing tries to write the last bytes and fails again.
        with contextlib.suppress(OSError):
            self._stream.close()


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors files of at most ``max_bytes`` and their index, holding one tensor at a time.

    Files that an earlier, interrupted call completed in ``folder`` are kept.
    """
    file_of = plan_files(shapes, dtype.itemsize, max_bytes)
    shapes_of: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, file in file_of.items():
        shapes_of.setdefault(file, {})[name] = shapes[name]
    writers: dict[str, SafetensorsWriter] = {}
    try:
        for name, tensor in tensors:
            file = file_of[name]
            if file not in writers:
                if (folder / file).exists():
                    continue
                writers[file] = SafetensorsWriter(folder / file, shapes_of[file], dtype)
            writers[file].write(name, tensor)
            del tensor  # the next tensor must not be made while this one is alive
    finally:
        for writer in writers.values():
            writer.close()
    if len(shapes_of) > 1:
        total = sum(math.prod(size) for size in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / WEIGHT_INDEX).write_text(json.dumps(index, indent=2))


def plan_files(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> dict[str, str]:
    """Return the file of every tensor, named as transformers names them."""
    number_of: dict[str, int] = {}
    number = 1
    used = 0
    for name, size in shapes.items():
        num_bytes = math.prod(size) * itemsize
        if used and used + num_bytes > max_bytes:
            number += 1
            used = 0
        number_of[name] = number
        used += num_bytes
    if number == 1:
        return dict.fromkeys(number_of, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in number_of.items()}
