"""Log-probabilities of given tokens from hidden states, without [T, V] float32 logits in memory.

The logits of a chunk of rows are computed twice: in the forward pass, which keeps only each row's
normaliser, and again in the backward pass. The vocabulary is split over the tensor-parallel group
as Megatron splits it. Shapes: T rows, t rows of a chunk, H hidden size, V this rank's vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26
"""Float32 logits in memory at a time on a rank (256 MiB); a chunk has at least 16 rows."""


def vocab_parallel_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``log softmax(hidden @ weight.T / temperature)[label]`` of each row, and its entropy.

    ``weight_VH`` is this rank's rows of the output embedding; rows at or beyond ``vocab_size``
    (padding) take no part. ``labels_T`` may hold anything where the result is not used.

    Returns float32 [T] twice, in nats; the entropy is detached, and None unless ``with_entropy``.
    The gradient of ``hidden_TH`` is this rank's part only: the caller sums it over ``group``.
    Raises ``ValueError`` unless ``temperature > 0``.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature={temperature}: log-probabilities need a positive temperature"
        )
    if group is not None and group.size() == 1:
        group = None
    rank = 0 if group is None else group.rank()
    first = rank * weight_VH.shape[0]
    valid = min(weight_VH.shape[0], vocab_size - first)
    rows = chunk_rows or rows_per_chunk(weight_VH.shape[0])
    logprobs_T, entropy_T = _Logprobs.apply(
        hidden_TH,
        weight_VH,
        labels_T - first,
        valid,
        temperature,
        with_entropy,
        group,
        rows,
    )
    return logprobs_T, entropy_T if with_entropy else None


def rows_per_chunk(vocabulary_rows: int) -> int:
    """Return the positions per chunk, given this rank's rows of the vocabulary."""
    return max(16, CHUNK_ELEMENTS // vocabulary_rows)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        valid: int,
        temperature: float,
        with_entropy: bool,
        group: dist.ProcessGroup | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        T = hidden_TH.shape[0]
        logprobs_T = hidden_TH.new_empty(T, dtype=torch.float32)
        lse_T = torch.empty_like(logprobs_T)
        entropy_T = hidden_TH.new_zeros(T if with_entropy else 0, dtype=torch.float32)
        for start in range(0, T, rows):
            part = slice(start, start + rows)
            logits_tV = _logits(hidden_TH[part], weight_VH, valid, temperature)
            logprobs_T[part], lse_T[part], entropy = _normalise(
                logits_tV, labels_T[part], with_entropy, group
            )
            if with_entropy:
                entropy_T[part] = entropy
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, lse_T)
        ctx.valid = valid
        ctx.temperature = temperature
        ctx.rows = rows
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, lse_T = ctx.saved_tensors
        grad_hidden_TH = torch.empty_like(hidden_TH)
        # In float32 whatever the weights' type: chunks would otherwise be summed in bfloat16.
        grad_weight_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        for start in range(0, hidden_TH.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            labels_t1 = labels_T[part, None]
            here_t1 = (labels_t1 >= 0) & (labels_t1 < ctx.valid)
            # d logprob / d logits = (onehot(label) - softmax) / temperature
            scale_t1 = grad_T[part, None].float() / ctx.temperature
            grad_tV = _logits(hidden_TH[part], weight_VH, ctx.valid, ctx.temperature)
            grad_tV.sub_(lse_T[part, None]).exp_().mul_(-scale_t1)
            grad_tV.scatter_add_(1, labels_t1.clamp(0, ctx.valid - 1), scale_t1 * here_t1)
            grad_tV = grad_tV.to(weight_VH.dtype)
            grad_hidden_TH[part] = grad_tV @ weight_VH[: ctx.valid]
            grad_weight_VH[: ctx.valid] += grad_tV.T @ hidden_TH[part]
        no_gradients = (None,) * 6
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), *no_gradients


def _logits(hidden_tH: Tensor, weight_VH: Tensor, valid: int, temperature: float) -> Tensor:
    """Return new float32 logits after temperature, [t, valid]."""
    logits_tV = F.linear(hidden_tH, weight_VH[:valid]).float()
    return logits_tV if temperature == 1 else logits_tV.div_(temperature)


def _normalise(
    logits_tV: Tensor, labels_t: Tensor, with_entropy: bool, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return label log-probability, log-sum-exp and entropy of each row; overwrites the logits."""
    valid = logits_tV.shape[1]
    here_t = (labels_t >= 0) & (labels_t < valid)
    target_t = logits_tV.gather(1, labels_t.clamp(0, valid - 1)[:, None])[:, 0]
    max_t = logits_tV.amax(1)
    if group is not None:
        dist.all_reduce(max_t, op=dist.ReduceOp.MAX, group=group)
    logits_tV.sub_(max_t[:, None])
    exp_tV = logits_tV.exp() if with_entropy else logits_tV.exp_()
    sums = [exp_tV.sum(1), torch.where(here_t, target_t - max_t, 0.0)]
    if with_entropy:
        sums.append(exp_tV.mul_(logits_tV).sum(1))
    sums_kt = torch.stack(sums)
    if group is not None:
        dist.all_reduce(sums_kt, group=group)
    log_sum_t = sums_kt[0].log()
    # H = log Z - sum p * logit, both relative to the row's maximum
    entropy_t = log_sum_t - sums_kt[2] / sums_kt[0] if with_entropy else None
    return sums_kt[1] - log_sum_t, log_sum_t + max_t, entropy_t
