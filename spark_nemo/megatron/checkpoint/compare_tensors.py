"""Comparison of two checkpoints, tensor by tensor: models of any format, or training states."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spark_nemo.config.errors import ConfigError

from .conversion import write_hf
from .reader import OpenedCheckpoint
from .torch_dist_reader import StoredCheckpoint

BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class Difference:
    """Result of comparing one tensor of two checkpoints."""

    name: str
    found: str
    """"same" (bit for bit), "differs", "shape", "dtype", or "missing"/"surplus" in the second."""
    max_abs: float = 0.0
    """Largest absolute difference of values; infinite if either has NaN."""
    detail: str = ""


def compare_models(one: OpenedCheckpoint, other: OpenedCheckpoint) -> Iterator[Difference]:
    """Compare every Hugging Face tensor of two models, with one tensor of each in memory."""
    yield from _compare(one.tensors, other.tensors)


def compare_stored(one: StoredCheckpoint, other: StoredCheckpoint) -> Iterator[Difference]:
    """Compare every tensor of two torch_dist folders, optimizer included, by stored name.

    The layouts that wrote them do not matter. Step, learning rate and generator state are not
    compared.
    """
    for name in dict.fromkeys([*one.tensors, *other.tensors]):
        a = one.tensors.get(name)
        b = other.tensors.get(name)
        if a is None or b is None:
            yield Difference(name, "surplus" if a is None else "missing")
        elif a.shape != b.shape or a.dtype != b.dtype:
            yield _unlike(name, a.shape, b.shape, a.dtype, b.dtype)
        else:
            blocks = _blocks(a.shape, a.dtype.itemsize)
            parts = [
                _values(name, one.read(name, offset, size), other.read(name, offset, size))
                for offset, size in blocks
            ]
            yield _worst(name, parts)


def _blocks(
    shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of blocks along the first axis: one row, or up to ``BLOCK_BYTES``."""
    if not shape:
        yield (), ()
        return
    rows = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], rows):
        yield (start, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:])


def _worst(name: str, parts: list[Difference]) -> Difference:
    found = "differs" if any(part.found == "differs" for part in parts) else "same"
    return Difference(name, found, max((part.max_abs for part in parts), default=0.0))


def _compare(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[Difference]:
    for name in dict.fromkeys([*one, *other]):
        if name not in one or name not in other:
            yield Difference(name, "missing" if name in one else "surplus")
            continue
        a, b = one[name], other[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            yield _unlike(name, tuple(a.shape), tuple(b.shape), a.dtype, b.dtype, a, b)
        else:
            yield _values(name, a, b)


def _unlike(
    name: str,
    shape_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Difference:
    if shape_a != shape_b:
        return Difference(name, "shape", math.inf, f"{shape_a} and {shape_b}")
    max_abs = _values(name, a, b).max_abs if a is not None and b is not None else math.inf
    return Difference(name, "dtype", max_abs, f"{dtype_a} and {dtype_b}")


def _values(name: str, a: Tensor, b: Tensor) -> Difference:
    if a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    ):
        return Difference(name, "same")
    largest = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return Difference(name, "differs", math.inf if math.isnan(largest) else largest)


@torch.no_grad()
def logits_difference(
    one: OpenedCheckpoint,
    other: OpenedCheckpoint,
    text: str,
    tokenizer: Path,
    max_tokens: int = 512,
) -> float:
    """Return the largest absolute difference of float32 logits on ``text``; infinite for NaN.

    transformers builds both models, one after the other; a checkpoint of another format is first
    converted into a temporary folder. Raises ``ConfigError`` without a tokenizer or with an empty
    text.
    """
    from transformers import AutoTokenizer

    files = [tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"]
    if not any(file.is_file() for file in files):
        raise ConfigError(f"{tokenizer} does not have a tokenizer: the text cannot be encoded")
    encode = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    ids = encode(text)["input_ids"][:max_tokens]
    if not ids:
        raise ConfigError("the text has no tokens")
    ids_1T = torch.tensor([ids])
    difference = logits(one, ids_1T) - logits(other, ids_1T)
    largest = float(difference.abs().max())
    return math.inf if math.isnan(largest) else largest  # NaN would pass every tolerance


def logits(checkpoint: OpenedCheckpoint, ids_1T: Tensor) -> Tensor:
    """Return float32 logits [T, V] of a model that transformers builds."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint.folder
        if checkpoint.kind != "hf":
            folder = Path(scratch)
            write_hf(folder, checkpoint, lambda num_bytes: None)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        return model.eval()(ids_1T).logits[0]
