"""Packing is exact: every token once, the shift right, within budget, and reversible."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark_nemo.training.packing import (
    TrainSequence,
    drop_longer_than,
    first_fit_decreasing,
    pack,
    pack_for_rank,
    sequence_cost,
    split_over_ranks,
)

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


def make_sequences(shapes):
    """Sequences whose token ids are all different, so that a misplaced token cannot hide."""
    counter = iter(range(10_000))
    sequences = []
    for prompt, response in shapes:
        prompt_ids = tuple(next(counter) for _ in range(prompt))
        response_ids = tuple(next(counter) for _ in range(response))
        sequences.append(
            TrainSequence(prompt_ids, response_ids, {"value": torch.tensor(response_ids).float()})
        )
    return sequences


@given(SHAPES, st.integers(1, 30))
def test_every_response_token_is_predicted_once_from_the_token_before_it(shapes, budget):
    """The shift: where the mask is 1 the label is a response token, the input its predecessor, the
    extra its own.
    """
    sequences = make_sequences(shapes)
    packed = pack(sequences, budget)
    pairs = [
        (int(token), int(label), float(extra))
        for batch in packed.micro_batches
        for token, label, extra, inside in zip(
            batch.tokens_T, batch.labels_T, batch.extras["value"], batch.loss_mask_T
        )
        if inside
    ]
    expected = []
    for sequence in sequences:
        ids = sequence.prompt_ids + sequence.response_ids
        first = len(sequence.prompt_ids)
        expected += [(ids[t - 1], ids[t], float(ids[t])) for t in range(first, len(ids))]
    assert sorted(pairs) == sorted(expected)


@given(SHAPES, st.integers(1, 30))
def test_packs_keep_sequences_whole_and_within_budget(shapes, budget):
    """Every sequence's tokens are contiguous with positions 0, 1, ...; only a sequence alone may
    exceed the budget.
    """
    sequences = make_sequences(shapes)
    seen = []
    for batch in pack(sequences, budget).micro_batches:
        bounds = batch.cu_seqlens_N.tolist()
        assert batch.num_tokens <= budget or len(bounds) == 2
        for start, end in pairwise(bounds):
            assert batch.positions_T[start:end].tolist() == list(range(end - start))
            seen.append(tuple(batch.tokens_T[start:end].tolist()) + (int(batch.labels_T[end - 1]),))
    assert sorted(seen) == sorted(
        sequence.prompt_ids + sequence.response_ids for sequence in sequences
    )


@given(SHAPES, st.integers(1, 30))
def test_unpack_undoes_pack(shapes, budget):
    """Per-position values come back per response token, in the order of the sequences given."""
    sequences = make_sequences(shapes)
    packed = pack(sequences, budget)
    rows = packed.unpack([batch.labels_T for batch in packed.micro_batches])
    assert [tuple(row.tolist()) for row in rows] == [
        sequence.response_ids for sequence in sequences
    ]


def test_unpack_ignores_what_a_parallel_layout_appended():
    """Sequence parallelism may return rows longer than the pack; the tail is dropped."""
    packed = pack(make_sequences([(2, 3), (1, 2)]), 99)
    (row,) = (batch.padded_to_multiple_of(8).labels_T for batch in packed.micro_batches)
    assert [values.tolist() for values in packed.unpack([row])] == [[2, 3, 4], [6, 7]]


def test_padding_for_sequence_parallelism_adds_no_loss():
    """The appended sequence has mask 0."""
    (batch,) = pack(make_sequences([(2, 3)]), 99).micro_batches
    assert batch.padded_to_multiple_of(8).loss_mask_T.sum() == 3


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_first_fit_decreasing_is_deterministic_and_tight(lengths, budget):
    """Each item once; no two packs could be merged, so at most one pack is less than half full."""
    packs = first_fit_decreasing(lengths, budget)
    assert packs == first_fit_decreasing(lengths, budget)
    assert sorted(index for items in packs for index in items) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in items) for items in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > budget


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_ranks_share_every_item_once_and_evenly(lengths, dp_size):
    """A partition; the busiest rank is at most one longest item above the average; no rank idles
    while items last.
    """
    shares = split_over_ranks(lengths, dp_size)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) <= sum(loads) / dp_size + max(lengths, default=0)
    if len(lengths) >= dp_size:
        assert all(shares)


@pytest.mark.parametrize("dp_size", [2, 8, 32])
@pytest.mark.parametrize("quadratic_cost", [0.0, 1e-4])
def test_random_lengths_are_balanced_to_a_few_percent(dp_size, quadratic_cost):
    """Busiest rank over mean at most 1.02 for 16 long-tailed responses per rank, in tokens and in
    cost, over 20 draws; What a step waits for.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = (
            (500 * torch.randn(16 * dp_size, generator=generator).mul(0.8).exp())
            .clamp(20, 8192)
            .int()
            .tolist()
        )
        costs = [sequence_cost(length, quadratic_cost) for length in lengths]
        loads = [sum(costs[i] for i in share) for share in split_over_ranks(costs, dp_size)]
        assert max(loads) <= 1.02 * max(sum(costs) / dp_size, max(costs))


def test_long_sequences_count_for_their_attention():
    """Equal tokens are not equal work: one sequence of 8,000 costs as much as three of 4,000 when c
    = 1 / 4,000, and gets its own rank; by tokens alone it would have shared it with a fourth.
    """
    sequences = make_sequences([(1, 80), (1, 40), (1, 40), (1, 40)])
    plain, aware = (
        [
            sum(
                batch.num_tokens
                for batch in pack_for_rank(sequences, 500, rank, 2, cost).micro_batches
            )
            for rank in range(2)
        ]
        for cost in (0.0, 1 / 40)
    )
    assert plain == [120, 80] and aware == [80, 120]


def test_a_rank_may_have_nothing():
    """Two sequences on three ranks: each goes to one rank, and the third has no micro-batch. The
    worker's business.
    """
    sequences = make_sequences([(2, 3), (4, 5)])
    shares = [pack_for_rank(sequences, 99, rank, 3).micro_batches for rank in range(3)]
    assert [sum(float(batch.loss_mask_T.sum()) for batch in share) for share in shares] == [
        5.0,
        3.0,
        0.0,
    ]
    assert [len(share) for share in shares] == [1, 1, 0]


def test_too_long_sequences_are_dropped_with_a_count():
    """Never silently, never by cutting their end off. The bound is on prompt plus response."""
    sequences = make_sequences([(2, 3), (3, 3), (1, 1)])
    kept, dropped = drop_longer_than(sequences, 5)
    assert (kept, dropped) == ([sequences[0], sequences[2]], 1)


def test_sequences_of_a_batch_must_carry_the_same_extras():
    """The slime trap: a per-token value that only some samples have must not vanish on the way."""
    with pytest.raises(ValueError, match="extras differ"):
        pack([TrainSequence((1,), (2,), {"a": torch.ones(1)}), TrainSequence((1,), (2,))], 99)
    with pytest.raises(ValueError, match="one value per response token"):
        TrainSequence((1,), (2, 3), {"a": torch.ones(3)})
