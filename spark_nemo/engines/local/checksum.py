"""SGLang's hash of a tensor in CPU memory, by which trainer and engines compare weights.

It is the first 8 bytes of SHA-256 over the raw bytes in row-major order
(srt/managers/mm_utils.py, ``tensor_hash``), as 16 hex digits.
"""

from __future__ import annotations

import hashlib

import torch

HEX_DIGITS = 16


class ByteDigest:
    """Hash of a tensor whose rows come block by block."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, block: torch.Tensor) -> None:
        """Add the next rows."""
        self._sha.update(raw_bytes(block))

    def hexdigest(self) -> str:
        """Return the 16 hex digits, once all rows have come."""
        return self._sha.hexdigest()[:HEX_DIGITS]


def tensor_checksum(tensor: torch.Tensor) -> str:
    """Return the hash of one whole tensor."""
    digest = ByteDigest()
    digest.update(tensor)
    return digest.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of ``tensor`` in row-major order, as a view of its memory where possible."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
