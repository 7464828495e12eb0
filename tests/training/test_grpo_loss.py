"""The losses against independent formulas, and their invariance to how a batch is cut."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark_nemo.config import RLConfig
from spark_nemo.config.rl import ClippedLoss, KLPenalty, LossConfig
from spark_nemo.training.fine_tuning import sft_loss
from spark_nemo.training.grpo_loss import (
    ADVANTAGES,
    ENGINE_LOGPROBS,
    MAX_LOG_RATIO,
    OLD_LOGPROBS,
    REFERENCE_LOGPROBS,
    WEIGHTS,
    aggregation_weights,
    clipped_surrogate,
    grpo_loss,
    importance_weights,
    kl_estimate,
)
from spark_nemo.training.packing import TrainSequence, pack

LENGTHS = (1, 5, 3, 8, 2)


def random_sequences(aggregation, seed=0):
    """Five sequences with every extra the loss can read; the fourth is twice the budget of the
    smaller packs.
    """
    torch.manual_seed(seed)
    weights = aggregation_weights(aggregation, LENGTHS)
    return [
        TrainSequence(
            tuple(range(1, 3 + k)),
            tuple(torch.randint(0, 9, (length,)).tolist()),
            {
                ADVANTAGES: torch.full((length,), float(torch.randn(()))),
                WEIGHTS: torch.full((length,), weight),
                ENGINE_LOGPROBS: -torch.rand(length),
                OLD_LOGPROBS: -torch.rand(length),
                REFERENCE_LOGPROBS: -torch.rand(length),
                "new": -torch.rand(length),
            },
        )
        for k, (length, weight) in enumerate(zip(LENGTHS, weights))
    ]


def loss_and_metrics(sequences, budget, loss_fn):
    """Sum over micro-batches and divide by the number of loss tokens, as the worker does."""
    batches = pack(sequences, budget).micro_batches
    num_tokens = sum(float(batch.loss_mask_T.sum()) for batch in batches)
    results = [
        loss_fn(batch.extras["new"], torch.ones(batch.num_tokens), batch) for batch in batches
    ]
    loss = sum(loss_sum for loss_sum, _ in results) / num_tokens
    return loss, {
        name: sum(float(m[name]) for _, m in results) / num_tokens for name in results[0][1]
    }


CONFIG = RLConfig(
    loss=ClippedLoss(num_minibatches=2, clip_low=0.2, clip_high=0.3), kl=KLPenalty(coef=0.05)
)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_loss_does_not_depend_on_micro_batching(aggregation, ratio):
    """One pack, a few, or one sequence each: equal loss and metrics up to float rounding. Ranks are
    but another cut.
    """
    loss_fn = partial(
        grpo_loss,
        config=replace(CONFIG, loss=replace(CONFIG.loss, importance_sampling_level=ratio)),
    )
    sequences = random_sequences(aggregation)
    loss, metrics = loss_and_metrics(sequences, 1000, loss_fn)
    for budget in (1, 7, 12):
        other_loss, other_metrics = loss_and_metrics(sequences, budget, loss_fn)
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_aggregations_are_the_means_they_are_called(aggregation):
    """Loss per sequence from scalar arithmetic (no clamp, no torch), then the mean over tokens or
    over sequences.
    """
    sequences = random_sequences(aggregation)
    per_sequence = []
    for s in sequences:
        rows = zip(
            *(
                s.extras[name].tolist()
                for name in ("new", OLD_LOGPROBS, ENGINE_LOGPROBS, REFERENCE_LOGPROBS, ADVANTAGES)
            )
        )
        per_sequence.append([naive_token_loss(*row) for row in rows])
    if aggregation == "token_mean":
        expected = sum(map(sum, per_sequence)) / sum(map(len, per_sequence))
    else:
        expected = sum(sum(tokens) / len(tokens) for tokens in per_sequence) / len(per_sequence)
    loss, _ = loss_and_metrics(sequences, 9, partial(grpo_loss, config=CONFIG))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def naive_token_loss(new, old, engine, reference, advantage):
    """One token by the book, with if instead of min and clamp."""
    ratio = math.exp(new - old)
    if advantage >= 0:
        surrogate = min(ratio, 1 + CONFIG.loss.clip_high) * advantage
    else:
        surrogate = max(ratio, 1 - CONFIG.loss.clip_low) * advantage
    importance = math.exp(old - engine)
    if importance > CONFIG.loss.tis_clip:
        importance = CONFIG.loss.tis_clip
    kl = math.exp(reference - new) - (reference - new) - 1
    return -importance * surrogate + CONFIG.kl.coef * kl


@given(st.floats(0.1, 3.0), st.floats(-2, 2), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_clipping_switches_the_gradient_off_where_it_says(ratio, advantage, clip_low, clip_high):
    """The two masks are where the loss no longer depends on the ratio; there its value is the
    bound's.
    """
    ratio_T = torch.tensor([ratio], requires_grad=True)
    loss_T, low_T, high_T = clipped_surrogate(
        ratio_T, torch.tensor([advantage]), clip_low, clip_high
    )
    loss_T.sum().backward()
    clipped = bool(low_T | high_T)
    assert not bool(low_T & high_T)
    assert float(ratio_T.grad) == pytest.approx(0.0 if clipped else -advantage, abs=1e-6)
    if clipped:
        bound = 1 - clip_low if low_T else 1 + clip_high
        assert float(loss_T) == pytest.approx(-bound * advantage, rel=1e-4, abs=1e-6)


def test_kl_estimators_have_the_expectations_and_gradients_they_claim():
    """Exact sums over a categorical: k1 and k3 give KL(policy, reference); k2's gradient is the
    KL's, k1's is zero and k3's that of KL(reference, policy).
    """
    torch.manual_seed(1)
    logits_V = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference_V = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logp_V = logits_V.log_softmax(0)
    probs_V = logp_V.detach().exp()

    def gradient(value):
        return torch.autograd.grad(value, logits_V, retain_graph=True)[0]

    kl = (logp_V.exp() * (logp_V - reference_V)).sum()
    opposite = (reference_V.exp() * (reference_V - logp_V)).sum()
    mean = {
        name: (probs_V * kl_estimate(logp_V, reference_V, name)).sum()
        for name in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(mean["k1"], kl)
    torch.testing.assert_close(mean["k3"], kl)
    torch.testing.assert_close(gradient(mean["k1"]), torch.zeros_like(logits_V), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient(mean["k2"]), gradient(kl))
    torch.testing.assert_close(gradient(mean["k3"]), gradient(opposite))


def test_importance_weights_are_truncated_and_carry_no_gradient():
    """min(exp(trainer - engine), cap); the correction must not be optimised itself."""
    trainer_T = torch.tensor([-1.0, -1.0, 90.0], requires_grad=True)
    weights_T = importance_weights(trainer_T, torch.tensor([-0.5, -3.0, -90.0]), 2.0)
    assert weights_T.tolist() == pytest.approx([math.exp(-0.5), 2.0, 2.0])
    assert not weights_T.requires_grad


def test_zero_advantage_and_positions_outside_the_mask_move_nothing():
    """A rollout with advantage 0 has gradient exactly 0; so have prompt positions, even if they
    hold NaN.
    """
    (batch,) = pack(random_sequences("token_mean")[:2], 99).micro_batches
    first_T = torch.arange(batch.num_tokens) < int(batch.cu_seqlens_N[1])
    batch.extras[ADVANTAGES][first_T] = 0.0
    del batch.extras[OLD_LOGPROBS]
    outside_T = batch.loss_mask_T == 0
    new_T = batch.extras["new"].masked_fill(outside_T, math.nan).requires_grad_()
    batch.extras[ENGINE_LOGPROBS][outside_T] = math.nan
    loss, metrics = grpo_loss(new_T, None, batch, config=RLConfig())
    loss.backward()
    assert torch.equal(new_T.grad != 0, ~first_T & ~outside_T)
    assert math.isfinite(float(loss))
    assert all(math.isfinite(float(value)) for value in metrics.values())


def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_reinforce():
    """One update per batch: loss gradient is -A * importance per token, nothing clipped, ratio
    exactly 1.
    """
    (batch,) = pack(random_sequences("token_mean"), 99).micro_batches
    del batch.extras[OLD_LOGPROBS]
    new_T = batch.extras["new"].clone().requires_grad_()
    maxima = {}
    loss, metrics = grpo_loss(
        new_T, None, batch, config=RLConfig(loss=LossConfig(tis_clip=None)), running_max=maxima
    )
    loss.backward()
    torch.testing.assert_close(new_T.grad, -batch.extras[ADVANTAGES] * batch.loss_mask_T)
    assert float(metrics["ratio_mean"]) == float(batch.loss_mask_T.sum())
    assert float(maxima["ratio_max"]) == 1.0
    assert float(metrics["clip_fraction_low"]) == float(metrics["clip_fraction_high"]) == 0.0
    expected = (
        (batch.extras["new"] - batch.extras[ENGINE_LOGPROBS]).abs() * batch.loss_mask_T
    ).max()
    assert float(maxima["engine_logprob_diff_max"]) == float(expected)


def test_one_freak_token_cannot_make_the_loss_infinite():
    """Log ratios are bounded before exp; the bound is far outside what training meets."""
    far = torch.tensor([-200.0])
    assert torch.isfinite(kl_estimate(far, torch.tensor([0.0]), "k3"))
    assert float(kl_estimate(far, torch.tensor([0.0]), "k3")) == pytest.approx(
        math.exp(MAX_LOG_RATIO), rel=1e-3
    )


def test_sft_loss_is_the_cross_entropy_of_the_response():
    """Against torch's cross_entropy with ignore_index on a padded copy of the batch."""
    torch.manual_seed(0)
    sequences = random_sequences("token_mean")
    batches = pack(sequences, 9).micro_batches
    logits = [torch.randn(batch.num_tokens, 9) for batch in batches]
    total = sum(
        sft_loss(logits_TV.log_softmax(-1).gather(1, batch.labels_T[:, None])[:, 0], None, batch)[0]
        for logits_TV, batch in zip(logits, batches)
    )
    labels_T = torch.cat(
        [batch.labels_T.masked_fill(batch.loss_mask_T == 0, -100) for batch in batches]
    )
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), labels_T)
    torch.testing.assert_close(total / sum(LENGTHS), expected)
