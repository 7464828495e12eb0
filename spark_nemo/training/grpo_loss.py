"""The losses of stages II and III: sums over positions, so that micro-batching and data parallelism
cannot change them.

The trainer divides the sum over all micro-batches and ranks of one optimizer step by N, the step's
number of loss tokens. Each loss here is ``sum_t w_t * loss_t`` with weights chosen so that this
quotient is the mean that was meant:

* token_mean    ``1/N sum_s sum_t loss_st``            -> w_st = 1
* sequence_mean ``1/S sum_s 1/R_s sum_t loss_st``      -> w_st = N / (S * R_s), since (1/N) * w_st = 1 / (S * R_s)
* length_constant ``1/S sum_s 1/L sum_t loss_st``       -> w_st = N / (S * L), L the longest response allowed (Dr.GRPO)

The weights come from the lengths R_s of *all* S sequences of the step (``aggregation_weights``),
never from those of one micro-batch; hence any split gives the same number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spark_nemo.config import RLConfig
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.worker import LossFn

DEFAULT_CLIP = 0.2
MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before exp, as in verl: one freak token must give a large loss, not an
infinite one.
"""

ADVANTAGES = "advantages"
WEIGHTS = "weights"
ENGINE_LOGPROBS = "engine_logprobs"
OLD_LOGPROBS = "old_logprobs"
REFERENCE_LOGPROBS = "reference_logprobs"


def aggregation_weights(
    aggregation: str,
    response_lengths: Sequence[int],
    max_length: int | None = None,
) -> list[float]:
    """Per-sequence weight of every token of that sequence (see the module's docstring).

    ``max_length`` is L, read by length_constant only, which has no length bias (arXiv 2503.20783,
    its section 3.1): under it alone the weights' mean over tokens is not 1. Raises ``ValueError``
    when it is missing there.
    """
    tokens, sequences = sum(response_lengths), len(response_lengths)
    match aggregation:
        case "token_mean":
            return [1.0] * sequences
        case "sequence_mean":
            return [tokens / (sequences * length) for length in response_lengths]
        case "length_constant":
            if max_length is None:
                raise ValueError(
                    "loss_aggregation=length_constant needs max_length, the longest response allowed"
                )
            return [tokens / (sequences * max_length)] * sequences
    raise ValueError(
        f"loss_aggregation={aggregation!r}: choose token_mean, sequence_mean or length_constant"
    )


def sequence_log_ratio(log_ratio_T: Tensor, inside_T: Tensor, cu_seqlens_N: Tensor) -> Tensor:
    """``log s_i = 1/R_i sum_t log ratio_t`` of every sequence, at each of its positions, with the
    token's own gradient.

    GSPO's length-normalised ratio in its token form ``sg[s_i] pi_t / sg[pi_t]``. Source: arXiv
    2507.18071, equations 7 and 14. The value is s_i on every token. Where advantage, weight and
    importance are the same on all tokens of a sequence, the gradient is that of the sequence form
    too; otherwise each token keeps its own. ``log_ratio_T`` is 0 outside the loss (``inside_T``).
    """
    ends_N = cu_seqlens_N[1:].to(torch.int64)
    sequence_T = torch.bucketize(
        torch.arange(log_ratio_T.numel(), device=log_ratio_T.device), ends_N, right=True
    )
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
    """PPO's pessimistic loss ``-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`` per
    position.

    Source: arXiv 1707.06347, equation 7; two separate bounds as in DAPO, arXiv 2503.14476, equation
    10. Also returns two boolean masks: where the lower and where the upper bound switches the
    gradient off.
    """
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    at_low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    at_high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    return loss_T, at_low_T, at_high_T


def kl_estimate(logprobs_T: Tensor, reference_T: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy, reference) from tokens the policy sampled. Source: Schulman
    2020, http://joschu.net/blog/kl-approx.html. With ``d = log policy - log reference``:

    * k1 = d: unbiased, may be negative. In a loss its expected gradient is 0: a metric, or a control experiment.
    * k2 = d^2 / 2: biased value, but its gradient is an unbiased estimate of the KL's gradient.
    * k3 = exp(-d) - 1 + d: unbiased and never negative (verl's ``low_var_kl``, the paper's choice). As a loss term its
      expected gradient is that of KL(reference, policy), the other direction.

    |d| is bounded by ``MAX_LOG_RATIO`` inside k3's exp only.
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


def importance_weights(trainer_T: Tensor, engine_T: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: ``min(exp(trainer logprob - engine logprob), cap)``, detached.

    Corrects that the engine, whose kernels and precision differ, sampled from a slightly different
    policy. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training".
    """
    return (trainer_T - engine_T).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def make_grpo_loss(config: RLConfig, maxima: dict[str, Tensor] | None = None) -> LossFn:
    """The GRPO loss of ``config`` over packed responses; its advantages come with the batch.

    Per position: ``weight * (importance * surrogate + kl_coef * kl)``, with ``extras`` ADVANTAGES
    and WEIGHTS always, ENGINE_LOGPROBS always, OLD_LOGPROBS when given (else the current
    log-probabilities, detached: the ratio is then exactly 1 and only its gradient matters),
    REFERENCE_LOGPROBS when ``config.kl_estimator`` is not none. Positions outside the loss mask
    contribute nothing, whatever values they hold.

    Metrics are sums over the loss tokens; ``engine_kl`` estimates KL(engine, trainer) from the
    engine's samples (k3). The largest ratio and the largest |trainer - engine| difference seen
    since are left in ``maxima`` when given, for they are no sums. ``config.importance_sampling_level`` says whether the
    ratio that is clipped is each token's or its sequence's (``sequence_log_ratio``); the metrics
    are of the one used.
    """
    clip_low = DEFAULT_CLIP if config.clip_low is None else config.clip_low
    clip_high = DEFAULT_CLIP if config.clip_high is None else config.clip_high

    def grpo_loss(
        logprobs_T: Tensor,
        entropy_T: Tensor | None,
        batch: PackedBatch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inside_T = batch.loss_mask_T > 0

        def masked(values_T: Tensor) -> Tensor:
            return torch.where(inside_T, values_T, 0.0)

        extras = {name: masked(values_T) for name, values_T in batch.extras.items()}
        logprobs_T = masked(logprobs_T)
        old_T = extras.get(OLD_LOGPROBS, logprobs_T.detach())
        log_ratio_T = logprobs_T - old_T
        if config.importance_sampling_level == "sequence":
            log_ratio_T = masked(sequence_log_ratio(log_ratio_T, inside_T, batch.cu_seqlens_N))
        log_ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio_T = log_ratio_T.exp()
        loss_T, at_low_T, at_high_T = clipped_surrogate(
            ratio_T, extras[ADVANTAGES], clip_low, clip_high
        )
        mismatch_T = (old_T - extras[ENGINE_LOGPROBS]).abs()
        metrics_T = {
            "clip_fraction_low": at_low_T,
            "clip_fraction_high": at_high_T,
            "approx_kl": ratio_T - 1 - log_ratio_T,
            "ratio_mean": ratio_T,
            "engine_logprob_diff_mean": mismatch_T,
            "engine_kl": kl_estimate(extras[ENGINE_LOGPROBS], old_T, "k3"),
        }
        if config.tis_clip is not None:
            importance_T = importance_weights(old_T, extras[ENGINE_LOGPROBS], config.tis_clip)
            loss_T = importance_T * loss_T
            metrics_T["importance_mean"] = importance_T
            metrics_T["importance_capped"] = importance_T >= config.tis_clip
        if config.kl_estimator != "none":
            kl_T = kl_estimate(logprobs_T, extras[REFERENCE_LOGPROBS], config.kl_estimator)
            loss_T = loss_T + config.kl_coef * kl_T
            metrics_T["reference_kl"] = kl_T
        if entropy_T is not None:
            metrics_T["entropy"] = entropy_T
        if maxima is not None:
            _keep_max(maxima, ratio_max=masked(ratio_T), engine_logprob_diff_max=mismatch_T)
        loss_sum = (extras[WEIGHTS] * loss_T).sum()
        return loss_sum, {
            name: masked(values_T.detach().float()).sum() for name, values_T in metrics_T.items()
        }

    return grpo_loss


def _keep_max(maxima: dict[str, Tensor], **values: Tensor) -> None:
    for name, values_T in values.items():
        largest = values_T.detach().max()
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest
