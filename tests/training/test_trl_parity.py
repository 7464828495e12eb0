"""Parity with TRL's GRPO loss, written out once here and, where trl is installed, called.

Source: ``trl/trainer/grpo_trainer.py`` (trl 1.16.0), ``GRPOTrainer._compute_loss``: loss_type "grpo" is our
sequence_mean, "bnpo" our token_mean and "dr_grpo" our length_constant; ``beta`` our kl_coef with k3;
``importance_sampling_level`` our ratio. Not covered: TRL's generation and batching.
"""

from types import SimpleNamespace

import pytest
import torch

from spark_nemo.config import RLConfig
from spark_nemo.training.advantages import group_advantages, rloo_advantages
from spark_nemo.training.losses import (
    ADVANTAGES,
    ENGINE_LOGPROBS,
    OLD_LOGPROBS,
    REFERENCE_LOGPROBS,
    WEIGHTS,
    aggregation_weights,
    make_grpo_loss,
)
from spark_nemo.training.packing import TrainSequence, pack

LENGTHS = torch.tensor([2, 7, 4, 5])
EPSILON_LOW, EPSILON_HIGH, BETA, CAP, MAX_LENGTH = 0.2, 0.28, 0.04, 2.0, 11


CASES = pytest.mark.parametrize(("loss_type", "aggregation", "ratio"), [
    ("grpo", "sequence_mean", "token"), ("bnpo", "token_mean", "token"), ("dr_grpo", "length_constant", "token"),
    ("grpo", "sequence_mean", "sequence"), ("bnpo", "token_mean", "sequence")])


def padded_batch():
    """Four responses padded to 7, right-aligned zeros as TRL has them."""
    torch.manual_seed(3)
    mask_NT = (torch.arange(7) < LENGTHS[:, None]).float()
    names = ("new", OLD_LOGPROBS, REFERENCE_LOGPROBS, ENGINE_LOGPROBS)
    return mask_NT, torch.randn(4), {name: -2 * torch.rand(4, 7) for name in names}


def trl_formula(mask_NT, advantages_N, rows, loss_type, ratio):
    """TRL's lines in TRL's padded layout, without its options we do not have."""
    advantages = advantages_N.unsqueeze(1)
    log_ratio = rows["new"] - rows[OLD_LOGPROBS]
    if ratio == "sequence":
        log_ratio = ((log_ratio * mask_NT).sum(-1) / mask_NT.sum(-1)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    coef_2 = torch.clamp(coef_1, 1 - EPSILON_LOW, 1 + EPSILON_HIGH)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token_loss = per_token_loss * torch.exp(rows[OLD_LOGPROBS] - rows[ENGINE_LOGPROBS]).clamp(max=CAP)
    difference = rows[REFERENCE_LOGPROBS] - rows["new"]
    per_token_loss = per_token_loss + BETA * (torch.exp(difference) - difference - 1)
    if loss_type == "grpo":
        return ((per_token_loss * mask_NT).sum(-1) / mask_NT.sum(-1)).mean()
    if loss_type == "dr_grpo":
        return (per_token_loss * mask_NT).sum() / (len(mask_NT) * MAX_LENGTH)
    return (per_token_loss * mask_NT).sum() / mask_NT.sum()


def our_loss(mask_NT, advantages_N, rows, aggregation, ratio):
    """The same batch through packing and our loss, two micro-batches; returns the loss and d loss / d new [N, T]."""
    config = RLConfig(updates_per_step=2, clip_low=EPSILON_LOW, clip_high=EPSILON_HIGH, kl_estimator="k3",
                      kl_coef=BETA, importance_cap=CAP, loss_aggregation=aggregation, ratio=ratio)
    lengths = LENGTHS.tolist()
    sequences = [
        TrainSequence((1, 2), (3,) * length, {
            ADVANTAGES: torch.full((length,), float(advantages_N[n])), WEIGHTS: torch.full((length,), weight),
            **{name: row_NT[n, :length] for name, row_NT in rows.items()}})
        for n, (length, weight) in enumerate(zip(lengths, aggregation_weights(aggregation, lengths, MAX_LENGTH)))
    ]
    packed = pack(sequences, 12)
    new = [batch.extras["new"].clone().requires_grad_() for batch in packed.micro_batches]
    loss_fn = make_grpo_loss(config)
    loss = sum(loss_fn(row_T, None, batch)[0] for row_T, batch in zip(new, packed.micro_batches)) / sum(lengths)
    loss.backward()
    return loss.detach(), packed.unpack([row_T.grad for row_T in new])


@CASES
def test_loss_and_gradient_equal_trls_formula(loss_type, aggregation, ratio):
    """Value and gradient with respect to every log-probability, packed against padded.

    Our sequence ratio has the token form: its gradient is TRL's only if importance is equal within a sequence.
    """
    mask_NT, advantages_N, rows = padded_batch()
    if ratio == "sequence":
        rows[ENGINE_LOGPROBS] = rows[OLD_LOGPROBS] - 0.1
    loss, grads = our_loss(mask_NT, advantages_N, rows, aggregation, ratio)
    rows["new"].requires_grad_()
    expected = trl_formula(mask_NT, advantages_N, rows, loss_type, ratio)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for n, grad_R in enumerate(grads):
        torch.testing.assert_close(grad_R, rows["new"].grad[n, :len(grad_R)])


@CASES
def test_loss_equals_trl_itself(loss_type, aggregation, ratio):
    """TRL's own method on the same numbers (skipped without trl)."""
    trl = pytest.importorskip("trl")
    mask_NT, advantages_N, rows = padded_batch()
    loss, _ = our_loss(mask_NT, advantages_N, rows, aggregation, ratio)
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda value, reduction: value, gather=lambda value: value)
    metrics = {"train": {name: [] for name in (
        "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "clip_ratio/low_min", "clip_ratio/high_max")}}
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=ratio, beta=BETA, loss_type=loss_type, epsilon_low=EPSILON_LOW,
        epsilon_high=EPSILON_HIGH, use_vllm=True, vllm_importance_sampling_correction=True,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, accelerator=accelerator, _metrics=metrics,
        _entropy_bonus_enabled=False, max_completion_length=MAX_LENGTH,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (rows["new"], torch.zeros(4, 7), None))
    ones = torch.ones(4, 2, dtype=torch.int64)
    expected = trl.GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": mask_NT.long(), "completion_mask": mask_NT,
        "advantages": advantages_N, "old_per_token_logps": rows[OLD_LOGPROBS],
        "ref_per_token_logps": rows[REFERENCE_LOGPROBS],
        "importance_sampling_ratio": torch.exp(rows[OLD_LOGPROBS] - rows[ENGINE_LOGPROBS]).clamp(max=CAP)})
    torch.testing.assert_close(loss, expected)


def test_advantages_equal_trls_formula():
    """(r - mean) / (unbiased std + 1e-4) over equal groups, as TRL's ``scale_rewards="group"``."""
    torch.manual_seed(0)
    rewards_N = torch.rand(12)
    grouped = rewards_N.view(3, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    got = group_advantages(
        rewards_N, [g for g in range(3) for _ in range(4)], torch.ones(12), std_normalise=True, eps=1e-4)
    torch.testing.assert_close(got, expected.flatten())


def test_leave_one_out_equals_trls_formula():
    """``RLOOTrainer``: the baseline of a reward is (sum of its group - itself) / (n - 1)."""
    torch.manual_seed(0)
    grouped = torch.rand(3, 4)
    expected = grouped - (grouped.sum(1, keepdim=True) - grouped) / 3
    got = rloo_advantages(grouped.flatten(), [g for g in range(3) for _ in range(4)], torch.ones(12))
    torch.testing.assert_close(got, expected.flatten())
