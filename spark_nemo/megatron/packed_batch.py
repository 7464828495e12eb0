"""One micro-batch for the trainer: several sequences packed in one row, without padding between
them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Several sequences end to end in one row of T tokens (one micro-batch).

    Whoever packs has already shifted: ``labels_T[t]`` is the token that follows ``tokens_T[t]`` in
    its own sequence, arbitrary where ``loss_mask_T`` is 0. So the log-probability at position t is
    that of ``labels_T[t]``.
    """

    tokens_T: Tensor
    """int64 [T]."""
    labels_T: Tensor
    """int64 [T], the target of each position."""
    positions_T: Tensor
    """int64 [T], 0, 1, 2, ... from the start of each sequence."""
    cu_seqlens_N: Tensor
    """int32 [N + 1], the boundaries of the N sequences: 0 first, T last."""
    loss_mask_T: Tensor
    """float32 [T]; its sum over all micro-batches and ranks is what the loss is divided by."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Anything else per position, each [T]: advantages, old log-probabilities, weights."""

    def __post_init__(self) -> None:
        T = self.tokens_T.numel()
        rows = {
            "tokens_T": self.tokens_T,
            "labels_T": self.labels_T,
            "positions_T": self.positions_T,
            "loss_mask_T": self.loss_mask_T,
            **{f"extras[{k!r}]": v for k, v in self.extras.items()},
        }
        for name, row in rows.items():
            if row.shape != (T,):
                raise ValueError(
                    f"PackedBatch.{name} has shape {tuple(row.shape)}: expected ({T},) like tokens_T"
                )
        bounds = self.cu_seqlens_N.tolist()
        if (
            T == 0
            or bounds[0] != 0
            or bounds[-1] != T
            or any(a >= b for a, b in itertools.pairwise(bounds))
        ):
            raise ValueError(
                f"PackedBatch.cu_seqlens_N={bounds[:8]}...: must rise strictly from 0 to T={T} (T > 0)"
            )

    @property
    def num_tokens(self) -> int:
        """T, the length of the row."""
        return self.tokens_T.numel()

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence in the pack."""
        return int((self.cu_seqlens_N[1:] - self.cu_seqlens_N[:-1]).max())

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on ``device``."""
        return PackedBatch(
            self.tokens_T.to(device),
            self.labels_T.to(device),
            self.positions_T.to(device),
            self.cu_seqlens_N.to(device),
            self.loss_mask_T.to(device),
            {name: row_T.to(device) for name, row_T in self.extras.items()},
        )

    def padded_to_multiple_of(self, multiple: int) -> PackedBatch:
        """Append one masked dummy sequence so that T divides by ``multiple`` (sequence parallelism
        splits the row).
        """
        missing = -self.num_tokens % multiple
        if missing == 0:
            return self

        def grow(row_T: Tensor) -> Tensor:
            return torch.cat([row_T, row_T.new_zeros(missing)])

        return PackedBatch(
            grow(self.tokens_T),
            grow(self.labels_T),
            torch.cat([self.positions_T, torch.arange(missing, device=self.positions_T.device)]),
            torch.cat(
                [self.cu_seqlens_N, self.cu_seqlens_N.new_tensor([self.num_tokens + missing])]
            ),
            grow(self.loss_mask_T),
            {k: grow(v) for k, v in self.extras.items()},
        )
