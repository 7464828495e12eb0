"""Packing of sequences into micro-batches, and back. The only place of the next-token shift.

A sequence of prompt p_0..p_{P-1} and response r_0..r_{R-1} becomes P + R - 1 positions: the input
is every token but the last, the label of a position is the token after it. ``loss_mask`` is 1 on
the R positions P-1 .. P+R-2 whose labels are the response, so position P-1+t carries everything
that belongs to r_t: its log-probability and its advantage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spark_nemo.megatron.packed_batch import PackedBatch


@dataclass(frozen=True)
class TrainSequence:
    """A prompt and the response to train on; ``extras[name]`` is float32 [R], one per token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.response_ids:
            raise ValueError(
                f"TrainSequence: {len(self.prompt_ids)} prompt tokens and "
                f"{len(self.response_ids)} response tokens; both need at least one, because the "
                "prompt predicts the first response token"
            )
        for name, values in self.extras.items():
            if values.shape != (len(self.response_ids),):
                raise ValueError(
                    f"TrainSequence.extras[{name!r}] has shape {tuple(values.shape)}: "
                    f"expected ({len(self.response_ids)},), one value per response token"
                )

    @property
    def num_positions(self) -> int:
        """Input positions in a pack: all tokens but the last."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class PackedSequences:
    """Micro-batches, and the place of each sequence's response in them.

    ``placement[i]`` is (micro-batch, first position, R) of sequence i's response tokens.
    """

    micro_batches: list[PackedBatch]
    placement: list[tuple[int, int, int]]

    def unpack(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Cut per-position values, [T] per micro-batch, into per-token values, [R] per sequence."""
        if len(values) != len(self.micro_batches):
            raise ValueError(
                f"unpack: {len(values)} rows of values for {len(self.micro_batches)} micro-batches"
            )
        return [values[pack][start : start + length] for pack, start, length in self.placement]


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items, longest first, into the first pack that stays within ``budget``.

    Deterministic: ties go by index. Packs, and the items in a pack, are returned in index order. An
    item longer than the budget gets its own pack. Uses at most 11/9 of the fewest possible packs
    plus one (Johnson 1973).
    """
    free: list[int] = []
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        pack = next((p for p, space in enumerate(free) if space >= lengths[index]), len(packs))
        if pack == len(packs):
            packs.append([])
            free.append(budget)
        packs[pack].append(index)
        free[pack] -= lengths[index]
    return sorted(sorted(pack) for pack in packs)


def sequence_cost(length: int, quadratic_cost: float) -> float:
    """Return the training cost ``T + c T^2`` of T positions, in units of one position's matmuls.

    c is ``MegatronWorker.quadratic_cost``; the square is attention over earlier positions.
    """
    return length + quadratic_cost * length**2


def split_over_ranks(lengths: Sequence[float], dp_size: int) -> list[list[int]]:
    """Give every item to one rank, so that the sums of lengths (or costs) are about equal.

    The longest item goes first, to the least loaded rank. No rank exceeds the average by more than
    the longest item, nor 4/3 of the best possible split (Graham 1969). Deterministic, so every rank
    computes the same split without communication. A rank gets nothing only if there are fewer items
    than ranks.
    """
    load = [0.0] * dp_size
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(dp_size), key=lambda r: (load[r], len(shares[r]), r))
        shares[rank].append(index)
        load[rank] += lengths[index]
    return [sorted(share) for share in shares]


def drop_longer_than(
    sequences: Sequence[TrainSequence], max_length: int
) -> tuple[list[TrainSequence], int]:
    """Return the sequences of at most ``max_length`` tokens in total, and the number dropped."""
    kept = [sequence for sequence in sequences if sequence.num_positions + 1 <= max_length]
    return kept, len(sequences) - len(kept)


def pack(sequences: Sequence[TrainSequence], tokens_per_micro_batch: int) -> PackedSequences:
    """Pack sequences into micro-batches of at most ``tokens_per_micro_batch`` positions.

    A longer sequence gets its own micro-batch.
    """
    packs = first_fit_decreasing(
        [sequence.num_positions for sequence in sequences], tokens_per_micro_batch
    )
    placement: list[tuple[int, int, int]] = [(0, 0, 0)] * len(sequences)
    for number, indices in enumerate(packs):
        offset = 0
        for index in indices:
            sequence = sequences[index]
            placement[index] = (
                number,
                offset + len(sequence.prompt_ids) - 1,
                len(sequence.response_ids),
            )
            offset += sequence.num_positions
    return PackedSequences(
        [_one_row([sequences[i] for i in indices]) for indices in packs], placement
    )


def pack_for_rank(
    sequences: Sequence[TrainSequence],
    tokens_per_micro_batch: int,
    dp_rank: int,
    dp_size: int,
    quadratic_cost: float = 0.0,
) -> PackedSequences:
    """Pack this rank's share of the sequences of one optimizer step.

    A step waits for its slowest rank, so shares are balanced by ``sequence_cost``; the budget of a
    micro-batch limits memory and counts positions. Ranks may have different numbers of
    micro-batches: gradients are reduced once, after the last, and pipeline stages communicate only
    within one data-parallel rank. A rank without sequences still has to call the worker.
    """
    costs = [sequence_cost(sequence.num_positions, quadratic_cost) for sequence in sequences]
    share = split_over_ranks(costs, dp_size)[dp_rank]
    return pack([sequences[index] for index in share], tokens_per_micro_batch)


def _one_row(sequences: Sequence[TrainSequence]) -> PackedBatch:
    """Put sequences end to end, shifted by one token."""
    lengths = torch.tensor([sequence.num_positions for sequence in sequences], dtype=torch.int32)
    names = sequences[0].extras.keys()
    for sequence in sequences:
        if sequence.extras.keys() != names:
            raise ValueError(
                "TrainSequence.extras differ within a batch: "
                f"{sorted(names)} and {sorted(sequence.extras)}"
            )
    ids = [sequence.prompt_ids + sequence.response_ids for sequence in sequences]
    before = [torch.zeros(len(sequence.prompt_ids) - 1) for sequence in sequences]

    def spread(rows: Sequence[Tensor]) -> Tensor:
        """Put per-response-token values [R] at their positions, with 0 at the prompts'."""
        return torch.cat([piece for pair in zip(before, rows) for piece in pair]).to(torch.float32)

    return PackedBatch(
        tokens_T=torch.tensor([token for row in ids for token in row[:-1]], dtype=torch.int64),
        labels_T=torch.tensor([token for row in ids for token in row[1:]], dtype=torch.int64),
        positions_T=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        cu_seqlens_N=torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)]),
        loss_mask_T=spread([torch.ones(len(sequence.response_ids)) for sequence in sequences]),
        extras={name: spread([sequence.extras[name] for sequence in sequences]) for name in names},
    )
