"""Group-normalised advantages (GRPO), with groups given by id and never by position."""

from __future__ import annotations

from collections.abc import Sequence

import torch

STD_EPS = 1e-6
"""Added to a group's standard deviation. verl uses 1e-6 and TRL 1e-4; both take the unbiased std, as we do."""


def group_advantages(
    rewards_N: torch.Tensor, groups: Sequence[int], valid_N: torch.Tensor, *, std_normalise: bool, eps: float = STD_EPS,
) -> torch.Tensor:
    """``A_i = (r_i - mean_g) / (std_g + eps)`` over the valid members of sample i's group g (without the division
    when ``std_normalise`` is off). Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2.

    ``std_g`` is the unbiased one (n - 1). A sample that is not valid gets exactly 0 and does not touch its group's
    statistics, whatever its reward is (NaN included). A group with fewer than two valid members gives 0: there is
    nothing to compare with. Groups may differ in size and be interleaved, so fanned-out or filtered batches keep
    their meaning; a reshape by a fixed group size would silently mix prompts.

    Returns float32 of shape (N,). Raises ``ValueError`` when lengths differ or a valid reward is not finite.
    """
    if not len(groups) == rewards_N.numel() == valid_N.numel():
        raise ValueError(
            f"group_advantages: {rewards_N.numel()} rewards, {len(groups)} group ids, {valid_N.numel()} valid flags")
    valid_N = valid_N.to(torch.bool)
    rewards_N = torch.where(valid_N, rewards_N.to(torch.float64), 0.0)
    if not torch.isfinite(rewards_N).all():
        raise ValueError("group_advantages: a valid sample has a reward that is not finite; mark it invalid instead")

    _, group_N = torch.unique(torch.tensor(list(groups), dtype=torch.int64), return_inverse=True)
    num_groups = int(group_N.max()) + 1 if len(groups) else 0
    weight_N = valid_N.to(torch.float64)

    def group_sum(values_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_N, values_N)

    count_G = group_sum(weight_N)
    mean_G = group_sum(rewards_N) / count_G.clamp(min=1)
    centred_N = (rewards_N - mean_G[group_N]) * weight_N
    if std_normalise:
        std_G = (group_sum(centred_N.square()) / (count_G - 1).clamp(min=1)).sqrt()
        centred_N = centred_N / (std_G + eps)[group_N]
    comparable_N = valid_N & (count_G[group_N] >= 2)
    return torch.where(comparable_N, centred_N, 0.0).to(torch.float32)
