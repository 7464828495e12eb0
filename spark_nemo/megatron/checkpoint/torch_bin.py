"""Weights in pytorch_model*.bin, read with torch's restricted unpickler (tensors only)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_folder import check_inside

INDEX = "pytorch_model.bin.index.json"
PICKLES = "pytorch_model*.bin"
"""Trainers leave other .bin files in the same folder."""


class PickledFolder(Mapping[str, Tensor]):
    """The tensors of a model folder without safetensors, memory-mapped file by file."""

    def __init__(self, folder: Path) -> None:
        """Map the files. Raises ``ConfigError`` if one is damaged or holds more than tensors."""
        self.folder = folder
        self._tensors: dict[str, Tensor] = {}
        for file in self._files():
            for name, value in self._load(file).items():
                if not isinstance(value, Tensor):
                    raise ConfigError(f"{file}: {name} is a {type(value).__name__}, not a tensor")
                self._tensors[name] = value

    def _files(self) -> list[Path]:
        if not (self.folder / INDEX).is_file():
            return sorted(self.folder.glob(PICKLES))
        try:
            names = sorted(
                set(json.loads((self.folder / INDEX).read_text())["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.folder / INDEX} is damaged: {error!r}") from error
        for name in names:
            is_file_name = isinstance(name, str) and Path(name).name == name
            if not is_file_name or not (self.folder / name).is_file():
                raise ConfigError(
                    f"{self.folder / INDEX} names {name!r}, which is not a file of the same folder"
                )
        return [self.folder / name for name in names]

    def _load(self, file: Path) -> dict[str, object]:
        check_inside(file, self.folder)
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file} holds a {type(loaded).__name__}, not named tensors")
        return loaded

    def describe(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor."""
        for name, tensor in self._tensors.items():
            if not tensor.is_floating_point():
                raise ConfigError(
                    f"tensor {name} in {self.folder} has dtype {tensor.dtype}; weights must be "
                    "floating-point numbers"
                )
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
