"""The hash of a tensor that trainer and engines agree on: SGLang's for a tensor in CPU memory.

The first 8 bytes of SHA-256 over the raw bytes in row-major order, as 16 hex digits (srt/managers/mm_utils.py,
``tensor_hash``).
"""

from __future__ import annotations

import hashlib

import torch

HEX_DIGITS = 16


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of ``tensor`` in row-major order; a view of its memory where it lies so on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_hash(tensor: torch.Tensor) -> str:
    """16 hex digits."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()[:HEX_DIGITS]
