"""Hash of a tensor as SGLang computes it, by which trainer and engines compare weights.

On a CPU it is ``engines.local.checksum.ByteDigest``; on a GPU a sum over mixed 32-bit words
(kernels/ops/memory/gpu_tensor_hash.py). Both are 16 hex digits and are computed here from blocks of
rows as they come.
"""

from __future__ import annotations

from typing import Protocol

import torch

from spark_nemo.engines.local.checksum import ByteDigest

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK32)
_POSITION_MIX = ((0x27D4EB2D, 15), (0x165667B1, 13))
_TILE = 8192
"""Words that are summed before they are mixed again."""
_MIX_BYTES = 8 << 20
"""Bytes that are mixed at once.

A mix costs about 50 small kernels, and a model with experts has tens of thousands of tensors.
"""


class TensorDigest(Protocol):
    """Hash of a tensor whose rows come block by block."""

    def update(self, block: torch.Tensor) -> None:
        """Add the next rows."""

    def hexdigest(self) -> str:
        """Return the 16 hex digits, once all rows have come."""


def digest_for(example: torch.Tensor, num_bytes: int) -> TensorDigest:
    """Return the digest for a tensor of ``num_bytes`` on the device of ``example``."""
    return WordDigest(num_bytes, example.device) if example.is_cuda else ByteDigest()


class WordDigest:
    """SGLang's GPU hash in plain torch.

    Per tile of 8192 words it sums mixed words in two ways, mixes the sums again and adds them.
    Raises ``ValueError`` for a block that ends inside a word.
    """

    # int32 is used for uint32: products and sums wrap alike, only right shifts need a mask.

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._words = num_bytes // 4
        self._position = 0
        self._held: list[torch.Tensor] = []
        self._held_words = 0
        self._sums_2K = torch.zeros(
            2, max(1, -(-self._words // _TILE)), dtype=torch.int64, device=device
        )

    def update(self, block: torch.Tensor) -> None:
        """See ``TensorDigest``."""
        raw_B = block.detach().contiguous().reshape(-1).view(torch.uint8)
        if raw_B.numel() % 4:
            raise ValueError(
                f"a block of {raw_B.numel()} bytes ends inside a 32-bit word: it has no hash of its own"
            )
        words_N = raw_B.view(torch.int32)
        self._held_words += words_N.numel()
        enough = (
            self._held_words * 4 >= _MIX_BYTES or self._position + self._held_words >= self._words
        )
        # A held block must be copied: the caller overwrites its buffer.
        self._held.append(words_N if enough else words_N.clone())
        if enough:
            self._mix_held()

    def _mix_held(self) -> None:
        words_N = self._held[0] if len(self._held) == 1 else torch.cat(self._held)
        self._held = []
        self._held_words = 0
        index_N = torch.arange(
            self._position, self._position + words_N.numel(), device=words_N.device
        )
        position_N = index_N.to(torch.int32)
        tile_N = index_N // _TILE
        for sums_K, seed, (factor, turn) in zip(self._sums_2K, _SEEDS, _POSITION_MIX):
            place_N = (position_N * _signed(factor) + _signed(seed)) ^ (
                (position_N << turn) | _shifted(position_N, 32 - turn)
            )
            mixed_N = _mix(words_N ^ place_N)
            sums_K.index_add_(0, tile_N, mixed_N.to(torch.int64) & _MASK32)
        self._position += words_N.numel()

    def hexdigest(self) -> str:
        """See ``TensorDigest``."""
        if self._held:
            self._mix_held()
        length = _signed(self._words * 4 & _MASK32)
        high, low = (
            (_mix(_wrapped(sums_K) ^ length).to(torch.int64) & _MASK32).tolist()
            for sums_K in self._sums_2K
        )
        total = sum((a << 32) | b for a, b in zip(high, low)) & _MASK64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            total = ((total ^ (total >> shift)) * factor) & _MASK64
        return f"{total ^ (total >> 31):016x}"


def _mix(x_N: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser."""
    x_N = (x_N ^ _shifted(x_N, 16)) * _signed(0x85EBCA6B)
    x_N = (x_N ^ _shifted(x_N, 13)) * _signed(0xC2B2AE35)
    return x_N ^ _shifted(x_N, 16)


def _shifted(x_N: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift without the sign."""
    return (x_N >> bits) & ((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def _wrapped(sums_K: torch.Tensor) -> torch.Tensor:
    """int64 sums modulo 2^32, as int32."""
    low_K = sums_K & _MASK32
    return torch.where(low_K >= 1 << 31, low_K - (1 << 32), low_K).to(torch.int32)
