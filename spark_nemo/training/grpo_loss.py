"""The GRPO loss. ``grpo_loss`` is the entry; every term of it is a pure function of this file.

Each response token t of sequence s contributes

    w_s * (rho_st * -min(r_st A_st, clip(r_st, 1 - clip_low, 1 + clip_high) A_st) + coef * KL_st)

* A: advantage (``training/advantages.py``, ``training/step_advantages.py``)
* r: ratio of current to old policy, per token or per sequence (``sequence_log_ratio``, GSPO)
* min, clip: PPO's clipped surrogate (``clipped_surrogate``)
* rho: truncated importance weight between trainer and engine (``importance_weights``)
* KL: estimate of KL(policy, reference) (``kl_estimate``)
* w: makes the result a mean over tokens, sequences or a constant length (``aggregation_weights``)

``training/grpo.py`` computes the inputs and makes the optimizer steps.

The loss is a sum over positions, and the trainer divides the sum over all micro-batches and ranks
of one optimizer step by N, the step's number of loss tokens. The weights w make this quotient the
intended mean; they come from all sequences of the step, so no split into micro-batches or ranks
changes the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spark_nemo.config import RLConfig
from spark_nemo.config.rl import KLPenalty
from spark_nemo.megatron.packed_batch import PackedBatch

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before exp, as in verl: an outlier token gives a large loss, not inf."""

# Keys of ``PackedBatch.extras``.
ADVANTAGES = "advantages"
WEIGHTS = "weights"
ENGINE_LOGPROBS = "engine_logprobs"
OLD_LOGPROBS = "old_logprobs"
REFERENCE_LOGPROBS = "reference_logprobs"


def grpo_loss(
    logprobs_T: Tensor,
    entropy_T: Tensor | None,
    batch: PackedBatch,
    *,
    config: RLConfig,
    running_max: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one micro-batch and its metrics, both summed over the loss tokens.

    A ``megatron.worker.LossFn`` once ``config`` is bound with ``functools.partial``. Source:
    DeepSeekMath, arXiv 2402.03300, equation 3; the module's docstring lists the terms.

    ``batch.extras`` holds ADVANTAGES, WEIGHTS and ENGINE_LOGPROBS; REFERENCE_LOGPROBS when there is
    a KL term; OLD_LOGPROBS when a step has several minibatches. Without OLD_LOGPROBS the old policy
    is the current one: the ratio is exactly 1 and only its gradient matters. Positions outside the
    loss mask contribute nothing, whatever values (NaN included) they hold.

    The metric ``engine_kl`` estimates KL(engine, trainer) from the engine's samples (k3). Metrics
    are sums, so maxima go into ``running_max``, which keeps the largest value over all calls.
    """
    inside_T = batch.loss_mask_T > 0

    def masked(values_T: Tensor) -> Tensor:
        return torch.where(inside_T, values_T, 0.0)

    extras = {name: masked(values_T) for name, values_T in batch.extras.items()}
    logprobs_T = masked(logprobs_T)
    old_T = extras.get(OLD_LOGPROBS, logprobs_T.detach())
    engine_T = extras[ENGINE_LOGPROBS]

    log_ratio_T = logprobs_T - old_T
    if config.loss.importance_sampling_level == "sequence":
        log_ratio_T = masked(sequence_log_ratio(log_ratio_T, inside_T, batch.cu_seqlens_N))
    log_ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_T = log_ratio_T.exp()
    loss_T, at_low_T, at_high_T = clipped_surrogate(
        ratio_T,
        extras[ADVANTAGES],
        clip_low=config.loss.clip_low,
        clip_high=config.loss.clip_high,
    )
    mismatch_T = (old_T - engine_T).abs()
    metrics_T = {
        "clip_fraction_low": at_low_T,
        "clip_fraction_high": at_high_T,
        "approx_kl": ratio_T - 1 - log_ratio_T,
        "ratio_mean": ratio_T,
        "engine_logprob_diff_mean": mismatch_T,
        "engine_kl": kl_estimate(engine_T, old_T, "k3"),
    }
    if config.loss.tis_clip is not None:
        importance_T = importance_weights(old_T, engine_T, config.loss.tis_clip)
        loss_T = importance_T * loss_T
        metrics_T["importance_mean"] = importance_T
        metrics_T["importance_capped"] = importance_T >= config.loss.tis_clip
    if isinstance(config.kl, KLPenalty):
        kl_T = kl_estimate(logprobs_T, extras[REFERENCE_LOGPROBS], config.kl.name)
        loss_T = loss_T + config.kl.coef * kl_T
        metrics_T["reference_kl"] = kl_T
    if entropy_T is not None:
        metrics_T["entropy"] = entropy_T
    if running_max is not None:
        _update_max(running_max, "ratio_max", masked(ratio_T))
        _update_max(running_max, "engine_logprob_diff_max", mismatch_T)

    loss_sum = (extras[WEIGHTS] * loss_T).sum()
    metric_sums = {
        name: masked(values_T.detach().float()).sum() for name, values_T in metrics_T.items()
    }
    return loss_sum, metric_sums


def sequence_log_ratio(log_ratio_T: Tensor, inside_T: Tensor, cu_seqlens_N: Tensor) -> Tensor:
    """Return GSPO's length-normalised log ratio ``1/R_s sum_t log r_st`` at each position.

    Source: arXiv 2507.18071, equations 7 and 14, in the token form ``sg[s] pi_t / sg[pi_t]``: the
    value is the same on every token of a sequence, the gradient is the token's own. Where
    advantage, weight and importance are constant over a sequence, this is also the gradient of the
    sequence form. ``log_ratio_T`` must be 0 outside the loss (``inside_T``).
    """
    ends_N = cu_seqlens_N[1:].to(torch.int64)
    positions_T = torch.arange(log_ratio_T.numel(), device=log_ratio_T.device)
    sequence_T = torch.bucketize(positions_T, ends_N, right=True)
    detached_T = log_ratio_T.detach()
    zeros_N = detached_T.new_zeros(ends_N.numel())
    sum_N = zeros_N.index_add(0, sequence_T, detached_T)
    count_N = zeros_N.index_add(0, sequence_T, inside_T.to(detached_T.dtype))
    return (sum_N / count_N.clamp(min=1))[sequence_T] + log_ratio_T - detached_T


def clipped_surrogate(
    ratio_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PPO's loss ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` per position.

    Source: arXiv 1707.06347, equation 7; separate bounds as in DAPO, arXiv 2503.14476, equation 10.
    Also returns two boolean masks: where the lower and where the upper bound zeroes the gradient.
    """
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    at_low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    at_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    return loss_T, at_low_T, at_high_T


def importance_weights(trainer_T: Tensor, engine_T: Tensor, cap: float) -> Tensor:
    """Return truncated importance weights ``min(exp(log trainer - log engine), cap)``, detached.

    They correct for the engine, whose kernels and precision differ from the trainer's, having
    sampled from a slightly different policy. Source: Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training".
    """
    return (trainer_T - engine_T).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def kl_estimate(logprobs_T: Tensor, reference_T: Tensor, estimator: str) -> Tensor:
    """Return a per-token estimate of KL(policy, reference) on tokens sampled from the policy.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html. With ``d = log policy - log
    reference``:

    * k1 = d: unbiased, may be negative. As a loss its expected gradient is 0: a control experiment.
    * k2 = d^2 / 2: biased, but its gradient is an unbiased estimate of the KL's gradient.
    * k3 = exp(-d) - 1 + d: unbiased, never negative (verl's ``low_var_kl``, the paper's choice). As
      a loss its expected gradient is that of the other direction, KL(reference, policy).

    k3 bounds |d| by ``MAX_LOG_RATIO`` inside the exp.
    """
    difference_T = logprobs_T - reference_T
    match estimator:
        case "k1":
            return difference_T
        case "k2":
            return 0.5 * difference_T.square()
        case "k3":
            return (-difference_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 + difference_T
    raise ValueError(f"kl_estimator={estimator!r}: choose k1, k2 or k3")


def aggregation_weights(
    aggregation: str,
    response_lengths: Sequence[int],
    max_length: int | None = None,
) -> list[float]:
    """Return one weight per sequence, which makes the trainer's ``sum / N`` the intended mean.

    With S sequences of R_s response tokens and N = sum of R_s:

    * token_mean       ``1/N sum_s sum_t loss_st``        -> w_s = 1
    * sequence_mean    ``1/S sum_s 1/R_s sum_t loss_st``  -> w_s = N / (S * R_s)
    * length_constant  ``1/S sum_s 1/L sum_t loss_st``    -> w_s = N / (S * L)

    ``max_length`` is L, the longest response allowed; only length_constant reads it and raises
    ``ValueError`` without it. Source: Dr. GRPO, arXiv 2503.20783, section 3.1: a constant divisor
    removes the bias towards long wrong responses. Only its weights do not average to 1 over tokens.
    """
    num_tokens = sum(response_lengths)
    num_sequences = len(response_lengths)
    match aggregation:
        case "token_mean":
            return [1.0] * num_sequences
        case "sequence_mean":
            return [num_tokens / (num_sequences * length) for length in response_lengths]
        case "length_constant":
            if max_length is None:
                raise ValueError(
                    "loss_aggregation=length_constant: max_length, the longest response allowed, "
                    "is missing"
                )
            return [num_tokens / (num_sequences * max_length)] * num_sequences
    raise ValueError(
        f"loss_aggregation={aggregation!r}: choose token_mean, sequence_mean or length_constant"
    )


def _update_max(running_max: dict[str, Tensor], name: str, values_T: Tensor) -> None:
    largest = values_T.detach().max()
    if name in running_max:
        largest = torch.maximum(running_max[name], largest)
    running_max[name] = largest
