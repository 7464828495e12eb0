"""Parity with TRL's losses and advantages: its own code is run on the same random batches, to 1e-5.

Source: ``trl/trainer/grpo_trainer.py`` and ``rloo_trainer.py`` (trl 1.16.0). Of
``GRPOTrainer._compute_loss`` the loss_type "grpo" is our sequence_mean, "bnpo" and "dapo" (over one
batch) our token_mean and "dr_grpo" our length_constant; ``beta`` our kl_coef with k3;
``importance_sampling_level`` our ratio, "sequence" being GSPO. DAPO is token_mean with a higher
upper clip. The loss is also written out here once. Not covered: TRL's generation and batching, and
REINFORCE++, which TRL has not (tests/training/test_advantages.py compares it with its definition).
"""

import ast
import inspect
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from spark_nemo.config import RLConfig
from spark_nemo.config.rl import ClippedLoss, KLPenalty
from spark_nemo.training.advantages import estimate_advantages, group_advantages, rloo_advantages
from spark_nemo.training.grpo_loss import (
    ADVANTAGES,
    ENGINE_LOGPROBS,
    OLD_LOGPROBS,
    REFERENCE_LOGPROBS,
    WEIGHTS,
    aggregation_weights,
    grpo_loss,
)
from spark_nemo.training.packing import TrainSequence, pack

WIDTH, SEEDS = 7, (3, 4, 5)
EPSILON_LOW, EPSILON_HIGH, BETA, CAP, MAX_LENGTH = 0.2, 0.28, 0.04, 2.0, 11


CASES = pytest.mark.parametrize(
    ("loss_type", "aggregation", "ratio"),
    [
        ("grpo", "sequence_mean", "token"),
        ("bnpo", "token_mean", "token"),
        ("dapo", "token_mean", "token"),
        ("dr_grpo", "length_constant", "token"),
        ("grpo", "sequence_mean", "sequence"),
        ("bnpo", "token_mean", "sequence"),
    ],
)
BATCHES = pytest.mark.parametrize("seed", SEEDS)


def padded_batch(seed, ratio="token"):
    """Four responses of random lengths padded to 7, right-aligned zeros as TRL has them.

    Under a sequence ratio importance is equal within a sequence: our token form of GSPO has TRL's
    gradient only there.
    """
    torch.manual_seed(seed)
    mask_NT = (torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (4, 1))).float()
    names = ("new", OLD_LOGPROBS, REFERENCE_LOGPROBS, ENGINE_LOGPROBS)
    rows = {name: -2 * torch.rand(4, WIDTH) for name in names}
    if ratio == "sequence":
        rows[ENGINE_LOGPROBS] = rows[OLD_LOGPROBS] - 0.1
    return mask_NT, torch.randn(4), rows


def trl_formula(mask_NT, advantages_N, rows, loss_type, ratio):
    """TRL's lines in TRL's padded layout, without its options we do not have."""
    advantages = advantages_N.unsqueeze(1)
    log_ratio = rows["new"] - rows[OLD_LOGPROBS]
    if ratio == "sequence":
        log_ratio = ((log_ratio * mask_NT).sum(-1) / mask_NT.sum(-1)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    coef_2 = torch.clamp(coef_1, 1 - EPSILON_LOW, 1 + EPSILON_HIGH)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token_loss = per_token_loss * torch.exp(rows[OLD_LOGPROBS] - rows[ENGINE_LOGPROBS]).clamp(
        max=CAP
    )
    difference = rows[REFERENCE_LOGPROBS] - rows["new"]
    per_token_loss = per_token_loss + BETA * (torch.exp(difference) - difference - 1)
    if loss_type == "grpo":
        return ((per_token_loss * mask_NT).sum(-1) / mask_NT.sum(-1)).mean()
    if loss_type == "dr_grpo":
        return (per_token_loss * mask_NT).sum() / (len(mask_NT) * MAX_LENGTH)
    return (per_token_loss * mask_NT).sum() / mask_NT.sum()


def our_loss(mask_NT, advantages_N, rows, aggregation, ratio):
    """The same batch through packing and our loss, two micro-batches; returns the loss and d loss /
    d new [N, T].
    """
    config = RLConfig(
        loss=ClippedLoss(
            num_minibatches=2,
            clip_low=EPSILON_LOW,
            clip_high=EPSILON_HIGH,
            tis_clip=CAP,
            aggregation=aggregation,
            importance_sampling_level=ratio,
        ),
        kl=KLPenalty(coef=BETA),
    )
    lengths = [int(row_T.sum()) for row_T in mask_NT]
    sequences = [
        TrainSequence(
            (1, 2),
            (3,) * length,
            {
                ADVANTAGES: torch.full((length,), float(advantages_N[n])),
                WEIGHTS: torch.full((length,), weight),
                **{name: row_NT[n, :length] for name, row_NT in rows.items()},
            },
        )
        for n, (length, weight) in enumerate(
            zip(lengths, aggregation_weights(aggregation, lengths, MAX_LENGTH))
        )
    ]
    packed = pack(sequences, 12)
    new = [batch.extras["new"].clone().requires_grad_() for batch in packed.micro_batches]
    loss_fn = partial(grpo_loss, config=config)
    loss = sum(
        loss_fn(row_T, None, batch)[0] for row_T, batch in zip(new, packed.micro_batches)
    ) / sum(lengths)
    loss.backward()
    return loss.detach(), packed.unpack([row_T.grad for row_T in new])


@BATCHES
@CASES
def test_loss_and_gradient_equal_trls_formula(loss_type, aggregation, ratio, seed):
    """Value and gradient with respect to every log-probability, packed against padded."""
    mask_NT, advantages_N, rows = padded_batch(seed, ratio)
    loss, grads = our_loss(mask_NT, advantages_N, rows, aggregation, ratio)
    rows["new"].requires_grad_()
    expected = trl_formula(mask_NT, advantages_N, rows, loss_type, ratio)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for n, grad_R in enumerate(grads):
        torch.testing.assert_close(grad_R, rows["new"].grad[n, : len(grad_R)])


def stand_in(rows, **settings):
    """A TRL trainer reduced to what ``_compute_loss`` reads."""
    accelerator = SimpleNamespace(
        num_processes=1,
        process_index=0,
        reduce=lambda value, reduction: value,
        gather=lambda value: value,
    )
    metrics = {
        "train": {
            name: []
            for name in (
                "kl",
                "entropy",
                "clip_ratio/low_mean",
                "clip_ratio/high_mean",
                "clip_ratio/region_mean",
                "clip_ratio/low_min",
                "clip_ratio/high_max",
            )
        }
    }
    return SimpleNamespace(
        aux_loss_enabled=False,
        epsilon_low=EPSILON_LOW,
        epsilon_high=EPSILON_HIGH,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            rows["new"],
            torch.zeros(4, WIDTH),
            None,
        ),
        **settings,
    )


@BATCHES
@CASES
def test_loss_and_gradient_equal_trl_itself(loss_type, aggregation, ratio, seed):
    """TRL's own method on the same numbers (skipped without trl)."""
    trl = pytest.importorskip("trl")
    mask_NT, advantages_N, rows = padded_batch(seed, ratio)
    loss, grads = our_loss(mask_NT, advantages_N, rows, aggregation, ratio)
    rows["new"].requires_grad_()
    trainer = stand_in(
        rows,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=ratio,
        beta=BETA,
        loss_type=loss_type,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        max_completion_length=MAX_LENGTH,
    )
    ones = torch.ones(4, 2, dtype=torch.int64)
    expected = trl.GRPOTrainer._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": mask_NT.long(),
            "completion_mask": mask_NT,
            "advantages": advantages_N,
            "old_per_token_logps": rows[OLD_LOGPROBS],
            "ref_per_token_logps": rows[REFERENCE_LOGPROBS],
            "num_items_in_batch": mask_NT.sum(),
            "importance_sampling_ratio": torch.exp(
                rows[OLD_LOGPROBS] - rows[ENGINE_LOGPROBS]
            ).clamp(max=CAP),
        },
    )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for n, grad_R in enumerate(grads):
        torch.testing.assert_close(grad_R, rows["new"].grad[n, : len(grad_R)])


@BATCHES
def test_the_rloo_gradient_equals_trl_itself(seed):
    """On the policy's own samples, where RLOO is defined: TRL's loss sums a response's tokens, so
    its gradient is that of our length_constant times the constant length. Off-policy the two clip
    different ratios and are not compared.
    """
    trl = pytest.importorskip("trl")
    mask_NT, advantages_N, rows = padded_batch(seed)
    rows = {name: rows["new"].clone() for name in rows}
    _, grads = our_loss(mask_NT, advantages_N, rows, "length_constant", "token")
    rows["new"].requires_grad_()
    ones = torch.ones(4, 2, dtype=torch.int64)
    loss = trl.RLOOTrainer._compute_loss(
        stand_in(rows),
        None,
        {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": mask_NT.long(),
            "completion_mask": mask_NT,
            "advantages": advantages_N,
            "old_logps": (rows[OLD_LOGPROBS] * mask_NT).sum(1),
        },
    )
    loss.backward()
    for n, grad_R in enumerate(grads):
        torch.testing.assert_close(grad_R * MAX_LENGTH, rows["new"].grad[n, : len(grad_R)])


def trl_advantages(trainer, rewards_N, group_size, **settings):
    """The lines of TRL's trainer that turn rewards into advantages, cut out of the method around
    them and run.

    TRL has no function for them. Fails when the lines are no longer found: then TRL has changed and
    this must be read again. Rewards are NaN where TRL calls a completion unscorable, our "not
    valid".
    """
    [method] = ast.parse(
        textwrap.dedent(inspect.getsource(trainer._generate_and_score_completions))
    ).body

    def assigns(node, name):
        return isinstance(node, ast.Assign) and [
            ast.unparse(target) for target in node.targets
        ] == [name]

    first = next(k for k, node in enumerate(method.body) if assigns(node, "unscorable_mask"))
    last = next(
        k
        for k, node in enumerate(method.body)
        if assigns(node, "advantages") and "nan_to_num" in ast.unparse(node)
    )
    names = {
        "self": SimpleNamespace(reward_weights=torch.ones(1), **settings),
        "rewards_per_func": rewards_N[:, None],
        "num_generations": group_size,
        "device": "cpu",
    }
    code = compile(ast.Module(method.body[first : last + 1], []), "trl", "exec")
    exec(code, {**vars(sys.modules[trainer.__module__]), **names}, names)
    return names["advantages"]


def scored(seed):
    """Rewards of five groups of four, some NaN: one group has one reward, one has none, one has no
    contrast.
    """
    torch.manual_seed(seed)
    rewards_GN = torch.rand(5, 4)
    rewards_GN[1, 1:], rewards_GN[2], rewards_GN[3], rewards_GN[4, 2] = (
        torch.nan,
        torch.nan,
        0.25,
        torch.nan,
    )
    rewards_N = rewards_GN.flatten()
    return rewards_N, [g for g in range(5) for _ in range(4)], ~rewards_N.isnan()


@BATCHES
@pytest.mark.parametrize("scale", ["group", "none"])
def test_group_advantages_equal_trl_itself(scale, seed):
    """ "group" is GRPO's (and DAPO's and GSPO's), "none" Dr.GRPO's; TRL adds 1e-4 to the std."""
    trl = pytest.importorskip("trl")
    rewards_N, groups, valid_N = scored(seed)
    expected = trl_advantages(
        trl.GRPOTrainer,
        rewards_N,
        4,
        scale_rewards=scale,
        multi_objective_aggregation="sum_then_normalize",
    )
    got = group_advantages(rewards_N, groups, valid_N, std_normalize=scale == "group", eps=1e-4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if scale == "none":
        torch.testing.assert_close(estimate_advantages("dr_grpo", rewards_N, groups, valid_N), got)


@BATCHES
def test_leave_one_out_advantages_equal_trl_itself(seed):
    """With TRL's own rule for siblings without a score: they are in no baseline."""
    trl = pytest.importorskip("trl")
    rewards_N, groups, valid_N = scored(seed)
    expected = trl_advantages(
        trl.RLOOTrainer, rewards_N, 4, reward_clip_range=None, beta=0.0, normalize_advantages=False
    )
    torch.testing.assert_close(
        rloo_advantages(rewards_N, groups, valid_N), expected, atol=1e-5, rtol=1e-5
    )


def test_advantages_equal_trls_formula():
    """(r - mean) / (unbiased std + 1e-4) over equal groups, as TRL's ``scale_rewards="group"``."""
    torch.manual_seed(0)
    rewards_N = torch.rand(12)
    grouped = rewards_N.view(3, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    got = group_advantages(
        rewards_N,
        [g for g in range(3) for _ in range(4)],
        torch.ones(12),
        std_normalize=True,
        eps=1e-4,
    )
    torch.testing.assert_close(got, expected.flatten())


def test_leave_one_out_equals_trls_formula():
    """``RLOOTrainer``: the baseline of a reward is (sum of its group - itself) / (n - 1)."""
    torch.manual_seed(0)
    grouped = torch.rand(3, 4)
    expected = grouped - (grouped.sum(1, keepdim=True) - grouped) / 3
    got = rloo_advantages(
        grouped.flatten(), [g for g in range(3) for _ in range(4)], torch.ones(12)
    )
    torch.testing.assert_close(got, expected.flatten())
