"""One micro-batch of the trainer: sequences packed end to end in one row, without padding."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Sequences end to end in one row of T tokens (one micro-batch).

    Labels are shifted already: ``labels_T[t]`` is the token that follows ``tokens_T[t]`` in its
    sequence, arbitrary where ``loss_mask_T`` is 0. The log-probability at position t belongs to
    ``labels_T[t]``.
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
    """float32 [T]; the loss is divided by its sum over all micro-batches and ranks."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Further values per position, each [T]: advantages, old log-probabilities, weights."""

    def __post_init__(self) -> None:
        T = self.tokens_T.numel()
        rows = {
            "tokens_T": self.tokens_T,
            "labels_T": self.labels_T,
            "positions_T": self.positions_T,
            "loss_mask_T": self.loss_mask_T,
        }
        rows |= {f"extras[{name!r}]": row_T for name, row_T in self.extras.items()}
        for name, row in rows.items():
            if row.shape != (T,):
                raise ValueError(
                    f"PackedBatch.{name} has shape {tuple(row.shape)}; expected ({T},) as tokens_T"
                )
        bounds = self.cu_seqlens_N.tolist()
        if (
            T == 0
            or bounds[0] != 0
            or bounds[-1] != T
            or any(a >= b for a, b in itertools.pairwise(bounds))
        ):
            raise ValueError(
                f"PackedBatch.cu_seqlens_N={bounds[:8]}...: must rise strictly from 0 to T={T}, "
                "which must be positive"
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
        """Return the same batch on ``device``."""
        return PackedBatch(
            self.tokens_T.to(device),
            self.labels_T.to(device),
            self.positions_T.to(device),
            self.cu_seqlens_N.to(device),
            self.loss_mask_T.to(device),
            {name: row_T.to(device) for name, row_T in self.extras.items()},
        )

    def padded_to_multiple_of(self, multiple: int) -> PackedBatch:
        """Append one masked dummy sequence so that T divides by ``multiple``.

        Sequence parallelism splits the row over that many ranks.
        """
        missing = -self.num_tokens % multiple
        if missing == 0:
            return self

        def grow(row_T: Tensor) -> Tensor:
            return torch.cat([row_T, row_T.new_zeros(missing)])

        dummy_positions = torch.arange(missing, device=self.positions_T.device)
        end = self.cu_seqlens_N.new_tensor([self.num_tokens + missing])
        return PackedBatch(
            tokens_T=grow(self.tokens_T),
            labels_T=grow(self.labels_T),
            positions_T=torch.cat([self.positions_T, dummy_positions]),
            cu_seqlens_N=torch.cat([self.cu_seqlens_N, end]),
            loss_mask_T=grow(self.loss_mask_T),
            extras={name: grow(row_T) for name, row_T in self.extras.items()},
        )
