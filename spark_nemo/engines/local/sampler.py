"""Draw one token per row by the inverse CDF of one uniform number of that row.

A row's draw therefore does not depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of N rows; ``top_p=1`` and ``top_k=0`` mean no cut.

    Greedy rows have temperature 1 here.
    """

    temperature_N: torch.Tensor
    greedy_N: torch.Tensor
    top_p_N: torch.Tensor
    top_k_N: torch.Tensor
    uniform_N: torch.Tensor
    any_greedy: bool
    any_cut: bool


def cut_probabilities(
    probs_NV: torch.Tensor, top_p_N: torch.Tensor, top_k_N: torch.Tensor
) -> torch.Tensor:
    """Set probabilities outside top-k, and outside the smallest set of mass >= top-p, to 0.

    top-k is applied first and top-p to the remainder, in Hugging Face's order. Tokens exactly as
    probable as the last one kept stay too, so that the result does not depend on how ties are
    sorted.
    """
    vocab = probs_NV.shape[1]
    top_k_N1 = torch.where(top_k_N == 0, vocab, top_k_N).clamp(max=vocab).unsqueeze(1)
    # numpy: only the values are needed, and its vectorised sort is 25 times faster than torch.sort.
    descending_NV = torch.from_numpy(np.sort(probs_NV.numpy(), axis=-1)).flip(-1)
    mass_NV = descending_NV.cumsum(-1)
    wanted_N1 = top_p_N.unsqueeze(1) * mass_NV.gather(1, top_k_N1 - 1)
    kept_by_p_N1 = torch.searchsorted(mass_NV, wanted_N1) + 1
    kept_N1 = torch.where(top_p_N.unsqueeze(1) < 1, torch.minimum(kept_by_p_N1, top_k_N1), top_k_N1)
    floor_N1 = descending_NV.gather(1, kept_N1 - 1)
    uncut_N1 = kept_N1 == vocab
    return probs_NV.masked_fill(probs_NV < floor_N1.masked_fill(uncut_N1, 0.0), 0.0)


def draw(logits_NV: torch.Tensor, rows: RowSampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sampled tokens (N,) and their log-probabilities (N,) in nats.

    A log-probability is taken from log_softmax(logits / T), before any cut; for a greedy token,
    from log_softmax(logits). Raises ``FloatingPointError`` when the logits are not finite.
    """
    logp_NV = torch.log_softmax(logits_NV / rows.temperature_N.unsqueeze(1), dim=-1)
    probs_NV = logp_NV.exp()
    if rows.any_cut:
        probs_NV = cut_probabilities(probs_NV, rows.top_p_N, rows.top_k_N)
    cdf_NV = probs_NV.cumsum(-1)
    total_N1 = cdf_NV[:, -1:]
    # A product rounded up to the total would select past the end.
    target_N1 = torch.minimum(
        rows.uniform_N.unsqueeze(1) * total_N1, total_N1.nextafter(torch.zeros_like(total_N1))
    )
    tokens_N = (
        torch.searchsorted(cdf_NV, target_N1, right=True)
        .squeeze(1)
        .clamp_(max=logits_NV.shape[1] - 1)
    )
    if rows.any_greedy:
        tokens_N = torch.where(rows.greedy_N, logits_NV.argmax(-1), tokens_N)
    chosen_N = logp_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    if not bool(chosen_N.isfinite().all()):
        raise FloatingPointError("logits are not finite: the served weights hold NaN or infinity")
    return tokens_N, chosen_N
