"""Conversion between Hugging Face, Megatron (torch_dist) and NeMo 2 folders, a tensor at a time.

It builds no model and needs no process group. Memory is bounded by the tensors of one file
(``torch_dist_writer.FILE_BYTES``) and the largest tensor. Values are copied, so a round trip is
bit-exact.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_folder import copy_companions, write_model_files
from spark_nemo.models.param_mapping import hf_tensor_shapes
from spark_nemo.utils.progress_bar import progress_bar

from ..hf_files import MAX_SHARD_BYTES, dtype_name, plan_files, write_tensors
from ..param_shards import to_shards
from . import nemo
from .global_tensors import GlobalTensors
from .reader import OpenedCheckpoint, hf_config_text, open_checkpoint
from .resumable import folder_fingerprint, resumable_folder
from .torch_dist_writer import Box, Source, no_extra_state, write_torch_dist
from .training_checkpoint import HF_FILES

FORMATS = ("hf", "megatron", "nemo")


@dataclass(frozen=True)
class Converted:
    """Folder and size of a finished conversion."""

    folder: Path
    num_tensors: int
    """Number of Hugging Face tensors."""
    num_bytes: int
    seconds: float


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    hf_config_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    show_progress: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Write the checkpoint ``source``, of any format, into the new folder ``target`` as ``to``.

    The folder appears when it is complete. After a kill the same call resumes and keeps finished
    files. Raises ``ConfigError`` naming the wrong file or tensor, and then leaves nothing behind.
    """
    if to not in FORMATS:
        raise ConfigError(f"to={to!r}: choose one of {', '.join(FORMATS)}")
    start = time.monotonic()
    source = Path(source)
    target = Path(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"output folder {target} is inside {source}: choose another")
    opened = open_checkpoint(source, hf_config_from, dtype, trust_pickle)
    if dtype is not None:
        opened = replace(opened, tensors=_Cast(opened.tensors, dtype, str(source)))
    shapes = hf_tensor_shapes(opened.spec)
    num_bytes = sum(map(math.prod, shapes.values())) * opened.dtype.itemsize
    job = {
        "from": opened.kind,
        "to": to,
        "files": folder_fingerprint(source),
        "dtype": str(opened.dtype),
        "max_shard_bytes": max_shard_bytes,
        "hf_config": opened.hf_config,
    }
    with (
        resumable_folder(target, job) as folder,
        progress_bar(
            total=num_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not show_progress,
            desc=f"{opened.kind} -> {to}",
        ) as bar,
    ):
        if to == "hf":
            write_hf(folder, opened, bar.update, max_shard_bytes)
        else:
            _write_megatron(folder, opened, to, bar)
    return Converted(target, len(shapes), num_bytes, time.monotonic() - start)


class _Cast(Mapping[str, Tensor]):
    """Tensors converted to another type.

    Raises ``ConfigError`` for a finite value that would become infinite: float16 ends at 65504.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, origin: str) -> None:
        self.tensors = tensors
        self.dtype = dtype
        self.origin = origin

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        cast = tensor.to(self.dtype)
        lost = ~torch.isfinite(cast)
        if lost.any() and (lost & torch.isfinite(tensor)).any():
            raise ConfigError(
                f"tensor {name} in {self.origin} has values up to "
                f"{float(tensor.abs().max()):.4g}, and {self.dtype} ends at "
                f"{torch.finfo(self.dtype).max:.4g}: choose another --dtype"
            )
        return cast

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def write_hf(
    folder: Path,
    opened: OpenedCheckpoint,
    progress: Callable[[int], object],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill ``folder`` with the Hugging Face form of a checkpoint; keep files finished there."""
    shapes = hf_tensor_shapes(opened.spec)
    for companions in opened.companions:
        copy_companions(companions, folder)
    write_model_files(folder, opened.hf_config, dtype_name(opened.dtype), None)
    file_of = plan_files(shapes, opened.dtype.itemsize, max_shard_bytes)

    def num_bytes(name: str) -> int:
        return math.prod(shapes[name]) * opened.dtype.itemsize

    def tensors() -> Iterator[tuple[str, Tensor]]:
        missing = [name for name in shapes if not (folder / file_of[name]).exists()]
        progress(sum(num_bytes(name) for name in set(shapes) - set(missing)))
        for name, tensor in _read_ahead(opened.tensors, missing):
            yield name, tensor
            progress(num_bytes(name))

    write_tensors(folder, tensors(), shapes, opened.dtype, max_shard_bytes)


def _read_ahead(
    tensors: Mapping[str, Tensor], names: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors ``names``; a thread reads the next one while the caller writes this one."""
    if not names:
        return
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(tensors.__getitem__, names[0])
        for name, following in pairwise([*names, None]):
            tensor = pending.result()
            if following is not None:
                pending = reader.submit(tensors.__getitem__, following)
            yield name, tensor


def _write_megatron(folder: Path, opened: OpenedCheckpoint, to: str, bar: tqdm) -> None:
    expected = GlobalTensors.of(opened.spec)

    def read(number: int) -> Tensor:
        param = expected.pieces[number].param
        tensors = [opened.tensors[name] for name in param.hf_shapes]
        return to_shards(param.split, tensors, opened.spec, 1)[0]

    if to == "nemo":
        weights = folder / nemo.WEIGHTS
        prefix = nemo.PREFIX
        nemo.write_context(folder, opened.hf_config, opened.spec, opened.dtype, opened.companions)
    else:
        weights = folder
        prefix = ""
        companions = folder / HF_FILES
        shutil.rmtree(companions, ignore_errors=True)
        companions.mkdir()
        for path in opened.companions:
            copy_companions(path, companions)
        (companions / "config.json").write_text(hf_config_text(opened.hf_config))
    boxes = [
        Box(prefix + piece.key, expected.shapes[piece.key], opened.dtype, piece.offset, piece.size)
        for piece in expected.pieces
    ]
    objects = dict.fromkeys((prefix + name for name in expected.extra_states), no_extra_state)
    write_torch_dist(weights, Source(boxes, read, objects), bar.update)
