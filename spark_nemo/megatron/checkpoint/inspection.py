"""Description of a checkpoint folder from headers and metadata alone, without its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from spark_nemo.config.errors import ConfigError

from ..hf_files import SafetensorsFolder
from . import nemo
from .detect_format import detect_format
from .torch_dist_reader import NOT_WEIGHTS, StoredCheckpoint, StoredTensor
from .training_checkpoint import HF_FILES


def describe(folder: str | Path, every_tensor: bool = True) -> Iterator[str]:
    """Yield lines of text: format, step, layout, sizes, then one line per tensor.

    Raises ``ConfigError`` for a damaged or unknown folder.
    """
    kind, weights = detect_format(folder)
    if kind == "nemo":
        yield f"NeMo 2 checkpoint {folder}"
        yield from _stored(weights / nemo.WEIGHTS, every_tensor)
        return
    if kind == "megatron":
        yield f"Megatron distributed checkpoint {weights}"
        has_config = (weights / HF_FILES / "config.json").is_file()
        source = f"{HF_FILES}/config.json" if has_config else "none (--hf-config is needed)"
        yield f"model configuration: {source}"
        yield from _stored(weights, every_tensor)
        return
    tensors = SafetensorsFolder(folder)
    found = tensors.describe(any_dtype=True)
    yield f"Hugging Face model {folder}"
    sizes = {name: math.prod(size) * dtype.itemsize for name, (size, dtype) in found.items()}
    yield f"{len(found)} tensors, {_bytes(sum(sizes.values()))}, in {len(tensors.files)} files"
    for name, (size, dtype) in found.items() if every_tensor else ():
        yield f"  {name}  {list(size)}  {_short(dtype)}  {_bytes(sizes[name])}"


def _stored(folder: Path, every_tensor: bool) -> Iterator[str]:
    stored = StoredCheckpoint(folder)
    try:
        yield from _common(stored)
    except ConfigError as error:
        yield f"common.pt: not read ({error})"
    groups: dict[str, dict[str, StoredTensor]] = {"weights": {}, "optimizer and others": {}}
    for key, tensor in stored.tensors.items():
        groups["optimizer and others" if key.startswith(NOT_WEIGHTS) else "weights"][key] = tensor
    for name, tensors in groups.items():
        if tensors:
            num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
            yield f"{name}: {len(tensors)} tensors, {_bytes(num_bytes)}"
    yield f"{len(stored.objects)} objects (extra states of Transformer Engine and the like)"
    if not every_tensor:
        return
    for key, tensor in stored.tensors.items():
        boxes = f"{len(tensor.chunks)} box" + ("es" if len(tensor.chunks) > 1 else "")
        dtype = _short(tensor.dtype)
        yield f"  {key}  {list(tensor.shape)}  {dtype}  {_bytes(tensor.num_bytes)}  {boxes}"


def _common(stored: StoredCheckpoint) -> Iterator[str]:
    common = stored.common()
    for key in ("step", "iteration"):
        if key in common:
            yield f"step: {common[key]}"
    content = common.get("content_metadata")
    if content:
        yield f"layout: {', '.join(f'{key}={value}' for key, value in sorted(content.items()))}"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.4g} {unit}"
