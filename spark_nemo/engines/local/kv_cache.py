"""Preallocated keys and values of the running requests and of recently prefilled prompts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from spark_nemo.models.spec import ModelSpec

LENGTH_STEP = 32
"""Attention runs over lengths rounded up to this, and capacities are multiples of it."""


def round_up(length: int, step: int = LENGTH_STEP) -> int:
    """Return the smallest multiple of ``step`` that is at least ``length``."""
    return -(-length // step) * step


@dataclass(frozen=True, slots=True)
class PrefixKV:
    """Keys and values of one prompt without its last token."""

    k_LKDT: torch.Tensor
    v_LKTD: torch.Tensor

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.v_LKTD.shape[2]


class KVCache:
    """Keys and values of the running requests, one row each.

    Writes are in place; rows move only when a request ends. Keys are stored head-dimension-major,
    (layer, row, kv head, D, T), so that query times keys streams along T; values are (layer, row,
    kv head, T, D). The store grows as needed and never shrinks.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._allocate(0, 0)

    def _allocate(self, rows: int, length: int) -> None:
        spec = self._spec
        lead = (spec.num_layers, rows, spec.num_kv_heads)
        # Zeros, not empty: masked positions are multiplied by probability 0, and 0 * NaN would be
        # NaN.
        self.k_LSKDT = torch.zeros(*lead, spec.head_dim, length)
        self.v_LSKTD = torch.zeros(*lead, length, spec.head_dim)

    @property
    def rows(self) -> int:
        """Rows allocated."""
        return self.v_LSKTD.shape[1]

    @property
    def length(self) -> int:
        """Token positions allocated per row."""
        return self.v_LSKTD.shape[3]

    def reserve(self, rows: int, length: int) -> None:
        """Grow to ``rows`` rows of ``length`` tokens, keeping what is stored."""
        if rows <= self.rows and length <= self.length:
            return
        old_k = self.k_LSKDT
        old_v = self.v_LSKTD
        old_rows = self.rows
        old_length = self.length
        grown_length = old_length
        if length > old_length:
            grown_length = round_up(max(length, old_length + old_length // 2))
        self._allocate(max(rows, old_rows), grown_length)
        self.k_LSKDT[:, :old_rows, :, :, :old_length] = old_k
        self.v_LSKTD[:, :old_rows, :, :old_length] = old_v

    def install(self, rows_M: torch.Tensor, prefix: PrefixKV) -> None:
        """Copy one prompt's keys and values into every row of ``rows_M``."""
        self.k_LSKDT[:, rows_M, :, :, : prefix.length] = prefix.k_LKDT.unsqueeze(1)
        self.v_LSKTD[:, rows_M, :, : prefix.length] = prefix.v_LKTD.unsqueeze(1)

    def move(self, source_M: torch.Tensor, target_M: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` positions of rows ``source_M`` to ``target_M`` (disjoint)."""
        self.k_LSKDT[:, target_M, :, :, :length] = self.k_LSKDT[:, source_M, :, :, :length]
        self.v_LSKTD[:, target_M, :, :length] = self.v_LSKTD[:, source_M, :, :length]


class PrefixStore:
    """Keys and values of the most recently used prompts, up to ``max_tokens`` in all.

    At least one prompt is kept.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], PrefixKV] = OrderedDict()
        self._tokens = 0

    def get(self, ids: tuple[int, ...]) -> PrefixKV | None:
        """Return the entry of exactly these ids and make it the most recently used one."""
        if ids in self._entries:
            self._entries.move_to_end(ids)
        return self._entries.get(ids)

    def put(self, ids: tuple[int, ...], prefix: PrefixKV) -> None:
        """Keep an entry, dropping the least recently used ones that no longer fit."""
        self._entries[ids] = prefix
        self._tokens += prefix.length
        while self._tokens > self._max_tokens and len(self._entries) > 1:
            self._tokens -= self._entries.popitem(last=False)[1].length

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._tokens = 0
