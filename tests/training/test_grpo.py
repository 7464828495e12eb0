"""From rollouts to optimizer steps, on a bigram model."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from bigram import BigramWorker

from spark_nemo.config import RLConfig, SamplingConfig
from spark_nemo.config.rl import ClippedLoss, KLPenalty, LossConfig
from spark_nemo.records import Problem, Rollout
from spark_nemo.training.advantages import group_advantages
from spark_nemo.training.grpo import build_sequences, split_by_groups, train_on_rollouts
from spark_nemo.training.grpo_loss import grpo_loss
from spark_nemo.training.packing import pack, pack_for_rank

GROUPS = (0, 0, 1, 1, 1, 2, 2)
LENGTHS = (3, 1, 4, 2, 2, 5, 1)


def rollout(group, ids, logprobs=None):
    count = len(ids)
    logprobs = tuple(logprobs or (-1.0,) * count)
    return Rollout(
        Problem(f"p{group}", "?"), group, (1, 2), tuple(ids), logprobs, (0,) * count, "", "stop"
    )


def batch(seed=0):
    """Seven rollouts in unequal groups with random tokens, advantages of both signs, all valid."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = [
        rollout(group, torch.randint(0, 8, (length,), generator=generator).tolist())
        for group, length in zip(GROUPS, LENGTHS)
    ]
    return rollouts, torch.randn(7, generator=generator)


def step(worker, rollouts, advantages_N, config=None, **kwargs):
    config = config or RLConfig(loss=LossConfig(tis_clip=None))
    return train_on_rollouts(
        worker, rollouts, advantages_N, config, tokens_per_micro_batch=8, **kwargs
    )


def test_masked_rollouts_leave_no_trace():
    """The gradient with two masked rollouts is bit for bit that of the batch without them, KL term
    included.
    """
    rollouts, advantages_N = batch()
    rollouts[1].valid = rollouts[3].valid = False
    config = RLConfig(kl=KLPenalty(coef=0.1), loss=LossConfig(aggregation="sequence_mean"))
    masked, filtered = BigramWorker(), BigramWorker()
    reference = BigramWorker(seed=5).snapshot()
    kept = [i for i in range(7) if rollouts[i].valid]
    metrics = step(masked, rollouts, advantages_N, config, reference=reference)
    step(
        filtered,
        [rollouts[i] for i in kept],
        advantages_N[kept],
        config,
        reference=reference,
    )
    assert torch.equal(masked.grads[0], filtered.grads[0])
    assert metrics["valid_fraction"] == 5 / 7


def per_token(advantages_N):
    """Advantages that differ within a response and are 0 on its first token."""
    return [
        a * torch.arange(length, dtype=torch.float32) for a, length in zip(advantages_N, LENGTHS)
    ]


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "length_constant"])
@pytest.mark.parametrize("dp_size", [2, 3, 9])
def test_ranks_together_make_the_gradient_of_one_process(aggregation, dp_size, stepwise):
    """All ranks' micro-batches against one rank's, with more ranks than rollouts too, and with an
    advantage per token. Not Megatron's all-reduce.
    """
    rollouts, advantages = batch()
    advantages = per_token(advantages) if stepwise else advantages
    config = RLConfig(loss=LossConfig(tis_clip=None, aggregation=aggregation))
    alone, together = BigramWorker(), BigramWorker()
    step(alone, rollouts, advantages, config)
    sequences = build_sequences(rollouts, advantages, aggregation, config.sampling.max_new_tokens)
    micro_batches = [
        b
        for rank in range(dp_size)
        for b in pack_for_rank(sequences, 8, rank, dp_size).micro_batches
    ]
    together.train_step(micro_batches, partial(grpo_loss, config=config))
    torch.testing.assert_close(together.grads[0], alone.grads[0])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_leaving_out_zero_advantages_does_not_change_the_gradient(aggregation):
    """Two groups without contrast are not computed, yet the third gets the gradient of the full
    computation.
    """
    rollouts, advantages_N = batch()
    advantages_N[:5] = 0.0
    config = RLConfig(loss=LossConfig(aggregation=aggregation))
    short, full = BigramWorker(), BigramWorker()
    metrics = step(short, rollouts, advantages_N, config)
    full.train_step(
        pack(build_sequences(rollouts, advantages_N, aggregation), 8).micro_batches,
        partial(grpo_loss, config=config),
    )
    torch.testing.assert_close(short.grads[0], full.grads[0])
    assert metrics["computed_fraction"] == 2 / 7


def test_an_advantage_of_zero_on_the_first_token_alone_does_not_leave_a_rollout_out():
    """Per-token advantages that start with 0 train as the full computation does; of seven rollouts
    the two of one token have nothing but that 0.
    """
    rollouts, advantages_N = batch()
    rows = per_token(advantages_N)
    short, full = BigramWorker(), BigramWorker()
    metrics = step(short, rollouts, rows)
    full.train_step(
        pack(build_sequences(rollouts, rows, "token_mean"), 8).micro_batches,
        partial(grpo_loss, config=RLConfig(loss=LossConfig(tis_clip=None))),
    )
    torch.testing.assert_close(short.grads[0], full.grads[0])
    assert metrics["computed_fraction"] == 5 / 7


def test_an_equal_advantage_on_every_token_is_the_scalar():
    """Bit for bit: the per-token path cannot change what scalars do."""
    rollouts, advantages_N = batch()
    scalar, rows = BigramWorker(), BigramWorker()
    step(scalar, rollouts, advantages_N)
    step(rows, rollouts, [torch.full((n,), float(a)) for n, a in zip(LENGTHS, advantages_N)])
    assert torch.equal(scalar.grads[0], rows.grads[0])


def test_advantages_of_another_length_are_refused():
    """Misaligned tokens are an error, never cut or padded."""
    rollouts, _ = batch()
    with pytest.raises(ValueError, match="one value per response token"):
        step(BigramWorker(), rollouts, [torch.ones(n + 1) for n in LENGTHS])


def test_a_batch_without_any_contrast_makes_a_step_with_gradient_zero():
    """The optimizer's state goes on as it would have; nothing divides by zero."""
    rollouts, _ = batch()
    worker = BigramWorker()
    assert step(worker, rollouts, torch.zeros(7))["loss"] == 0.0
    assert worker.grads[0].abs().max() == 0.0


def test_one_update_needs_no_extra_pass_and_kl_only_the_reference():
    """The passes the configuration does not need are not made."""
    for config, passes in [
        (RLConfig(), 0),
        (RLConfig(kl=KLPenalty("k1", 0.1)), 1),
        (RLConfig(loss=ClippedLoss(num_minibatches=3)), 3),
        (RLConfig(loss=ClippedLoss(num_minibatches=3), kl=KLPenalty("k2", 0.1)), 6),
    ]:
        worker = BigramWorker()
        step(worker, *batch(), config, reference=worker.snapshot())
        assert worker.logprob_passes == passes
        assert len(worker.grads) == config.loss.num_minibatches


def test_several_updates_share_the_old_policy():
    """Old log-probabilities are those before the first update: its ratios are 1, the later parts'
    are not.
    """
    rollouts, advantages_N = batch()
    config = RLConfig(
        loss=ClippedLoss(num_minibatches=3, clip_low=0.01, clip_high=0.01, tis_clip=None)
    )
    metrics = step(BigramWorker(lr=0.5), rollouts, advantages_N, config)
    assert metrics["ratio_max"] > 1.01
    assert metrics["clip_fraction_low"] + metrics["clip_fraction_high"] > 0
    frozen = step(BigramWorker(lr=0.0), rollouts, advantages_N, config)
    assert frozen["ratio_mean"] == pytest.approx(1.0)
    assert frozen["approx_kl"] == pytest.approx(0.0, abs=1e-7)


def test_updates_split_by_whole_groups():
    """Every sample once, groups whole, at most one group apart in size, empty parts left out."""
    assert split_by_groups([5, 5, 3, 5, 8, 3], 2) == [[0, 1, 3], [2, 5, 4]]
    assert split_by_groups([1, 1], 4) == [[0, 1]]


def test_the_loop_learns_what_is_rewarded():
    """Sampling from the bigram and rewarding token 3 raises its probability: sign and scale are
    right end to end.
    """
    worker = BigramWorker(lr=0.2)
    generator = torch.Generator().manual_seed(0)
    config = RLConfig(sampling=SamplingConfig(temperature=0.7))
    for _ in range(20):
        probs_V = (worker.table_VV[2].detach() / 0.7).softmax(-1)
        draws = torch.multinomial(probs_V, 8, replacement=True, generator=generator).tolist()
        rollouts = [rollout(0, [token], [math.log(probs_V[token])]) for token in draws]
        rewards_N = torch.tensor([float(token == 3) for token in draws])
        advantages_N = group_advantages(
            rewards_N, [0] * 8, torch.ones(8, dtype=torch.bool), std_normalize=True
        )
        metrics = step(worker, rollouts, advantages_N, config)
        assert metrics["engine_logprob_diff_max"] < 1e-5
    assert worker.table_VV[2].softmax(-1)[3] > 0.9


def test_what_cannot_be_trained_on_is_named():
    """No silent no-op: an all-masked batch and a KL term without reference are errors."""
    rollouts, advantages_N = batch()
    with pytest.raises(ValueError, match="nothing to train on"):
        step(BigramWorker(), [replace(r, valid=False) for r in rollouts], advantages_N)
    with pytest.raises(ValueError, match="reference snapshot"):
        step(
            BigramWorker(),
            rollouts,
            advantages_N,
            RLConfig(kl=KLPenalty(coef=0.1)),
        )
