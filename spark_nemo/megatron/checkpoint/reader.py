"""Reading a Hugging Face, Megatron (torch_dist) or NeMo 2 folder as Hugging Face tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spark_nemo.config.errors import ConfigError, without_effect
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.hf_folder import WEIGHT_INDEX
from spark_nemo.models.param_mapping import hf_tensor_shapes
from spark_nemo.models.spec import ModelSpec
from spark_nemo.models.tokenizer_check import check_tokenizer

from ..hf_files import SafetensorsFolder
from ..hf_weights import check_names, check_tied_head
from ..param_shards import from_gathered
from . import nemo
from .detect_format import detect_format
from .global_tensors import GlobalTensors, check_stored_shapes
from .torch_bin import PICKLES, PickledFolder
from .torch_dist_reader import StoredCheckpoint
from .training_checkpoint import HF_FILES


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose names, shapes and types match its configuration; no tensor is read yet."""

    kind: str
    """"hf", "megatron" or "nemo"."""
    folder: Path
    """Folder of the weights."""
    hf_config: dict[str, Any]
    spec: ModelSpec
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    """By Hugging Face name, in the order of ``hf_tensor_shapes``; read on access."""
    companions: tuple[Path, ...]
    """Folders with the tokenizer and generation files."""
    stored: StoredCheckpoint | None
    """The torch_dist folder; None for a Hugging Face folder."""


def open_checkpoint(
    folder: str | Path,
    hf_config_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
) -> OpenedCheckpoint:
    """Detect the format of a checkpoint and check it against its configuration.

    ``hf_config_from`` is a folder with the model's config.json (and tokenizer), for Megatron
    folders without one. A type other than config.json's is an error unless ``dtype`` is the type to
    convert to. ``trust_pickle`` allows ``pytorch_model*.bin``. Raises ``ConfigError`` naming what
    is missing, surplus, misshapen or damaged.
    """
    kind, weights = detect_format(folder)
    if kind == "nemo":
        return _open_nemo(weights, hf_config_from, dtype)
    if kind == "megatron":
        return _open_megatron(weights, hf_config_from, dtype)
    if hf_config_from:
        raise without_effect(
            "--hf-config", hf_config_from, f"for {folder}, a Hugging Face folder with its own"
        )
    return _open_hf(weights, dtype, trust_pickle)


def _open_hf(folder: Path, dtype: torch.dtype | None, trust_pickle: bool) -> OpenedCheckpoint:
    config = read_hf_config(folder)
    spec = ModelSpec.from_hf(config, f"{folder}/config.json")
    check_tokenizer(folder, spec)
    pickles = sorted(folder.glob(PICKLES))
    if pickles and not (folder / WEIGHT_INDEX).is_file() and not list(folder.glob("*.safetensors")):
        if not trust_pickle:
            raise ConfigError(
                f"{pickles[0]} is a pickle, and {folder} has no safetensors: pass --trust-pickle "
                "if you know who made it"
            )
        tensors = PickledFolder(folder)
    else:
        tensors = SafetensorsFolder(folder)
    found = tensors.describe()
    check_names(set(found), spec, str(folder))
    expected = hf_tensor_shapes(spec)
    for name, size in expected.items():
        if found[name][0] != size:
            raise ConfigError(
                f"tensor {name} in {folder} has shape {found[name][0]}, config.json says {size}"
            )
    check_tied_head(tensors, spec, str(folder))
    types = {name: found[name][1] for name in expected}
    chosen = _one_dtype(types, config, dtype, str(folder))
    return OpenedCheckpoint(
        kind="hf",
        folder=folder,
        hf_config=config,
        spec=spec,
        dtype=chosen,
        tensors=_Ordered(tensors, list(expected)),
        companions=(folder,),
        stored=None,
    )


def _open_megatron(
    folder: Path, hf_config_from: str | Path | None, dtype: torch.dtype | None
) -> OpenedCheckpoint:
    stored = StoredCheckpoint(folder)
    companions = Path(hf_config_from) if hf_config_from else folder / HF_FILES
    if not hf_config_from and not companions.is_dir():
        raise ConfigError(
            f"{folder} has no {HF_FILES}/config.json, so its model is unknown: pass --hf-config "
            "with a folder that has the model's config.json"
        )
    config = read_hf_config(companions)
    return _of_stored("megatron", stored, config, f"{companions}/config.json", dtype, (companions,))


def _open_nemo(
    folder: Path, hf_config_from: str | Path | None, dtype: torch.dtype | None
) -> OpenedCheckpoint:
    stored = StoredCheckpoint(folder / nemo.WEIGHTS)
    nemo.check_norms(stored)
    if hf_config_from:
        config = read_hf_config(hf_config_from)
        source = f"{hf_config_from}/config.json"
        companions = (Path(hf_config_from),)
    else:
        config = nemo.hf_config(folder, stored)
        source = f"{folder / nemo.CONTEXT / nemo.MODEL_YAML}"
        companions = nemo.companions(folder)
    return _of_stored("nemo", stored, config, source, dtype, companions)


def _of_stored(
    kind: str,
    stored: StoredCheckpoint,
    config: dict[str, Any],
    source: str,
    dtype: torch.dtype | None,
    companions: tuple[Path, ...],
) -> OpenedCheckpoint:
    spec = ModelSpec.from_hf(config, source)
    weights = stored.weights()
    expected = GlobalTensors.like(spec, weights)
    check_stored_shapes(
        {key: tensor.shape for key, tensor in weights.items()}, expected, str(stored.folder)
    )
    types = {key: weights[key].dtype for key in expected.shapes}
    for key, found in types.items():
        if not found.is_floating_point:
            raise ConfigError(
                f"tensor {key} in {stored.folder} has dtype {found}; weights must be "
                "floating-point numbers"
            )
    # config.json's dtype is not checked: the trainer chooses the type of a training checkpoint.
    chosen = _one_dtype(types, {}, dtype, str(stored.folder))
    return OpenedCheckpoint(
        kind=kind,
        folder=stored.folder,
        hf_config=config,
        spec=spec,
        dtype=chosen,
        tensors=_StoredTensors(stored, expected, spec),
        companions=companions,
        stored=stored,
    )


def _one_dtype(
    types: dict[str, torch.dtype], config: dict[str, Any], wanted: torch.dtype | None, origin: str
) -> torch.dtype:
    """Return ``wanted``, else the one type of all tensors."""
    if wanted is not None:
        return wanted
    stated = config.get("dtype") or config.get("torch_dtype")
    known = {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float64": torch.float64,
    }
    if stated is not None and (not isinstance(stated, str) or stated not in known):
        raise ConfigError(
            f"{origin}/config.json: dtype={stated!r} is not one of {', '.join(known)}"
        )
    expected = known[stated] if stated is not None else next(iter(types.values()))
    for name, found in types.items():
        if found != expected:
            says = "config.json says" if stated is not None else "other tensors have"
            raise ConfigError(
                f"tensor {name} in {origin} has dtype {found}, {says} {expected}: pass --dtype to "
                "convert all tensors to one type"
            )
    return expected


class _Ordered(Mapping[str, Tensor]):
    """The tensors of the model in its order, without the caches and copies in some files."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str]) -> None:
        self.tensors = tensors
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _StoredTensors(Mapping[str, Tensor]):
    """Hugging Face tensors cut from the boxes of a distributed checkpoint.

    The last box read is kept: several Hugging Face tensors come from one box.
    """

    def __init__(self, stored: StoredCheckpoint, expected: GlobalTensors, spec: ModelSpec) -> None:
        self.stored = stored
        self.spec = spec
        self.prefix = stored.prefix
        self.piece_of = {name: piece for piece in expected.pieces for name in piece.param.hf_shapes}
        self._last: tuple[object, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        piece = self.piece_of[name]
        if self._last[0] is not piece:
            self._last = (None, {})  # freed before the next box is read
            box = self.stored.read(self.prefix + piece.key, piece.offset, piece.size)
            parameter = box.reshape(piece.size[len(piece.size) - self._rank(piece) :])
            parts = from_gathered(piece.param.split, parameter, self.spec, 1)
            self._last = (piece, dict(zip(piece.param.hf_shapes, parts)))
        return self._last[1][name]

    @staticmethod
    def _rank(piece: Any) -> int:
        return len(next(iter(piece.param.hf_shapes.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self.piece_of)

    def __len__(self) -> int:
        return len(self.piece_of)


def hf_config_text(config: dict[str, Any]) -> str:
    """Return the text of config.json without ``auto_map``, which names code to run."""
    return json.dumps({key: value for key, value in config.items() if key != "auto_map"}, indent=2)
