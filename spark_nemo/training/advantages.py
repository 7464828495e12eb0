"""One advantage per response: GRPO and its relatives, with groups given by id, never by position.

Common to all: an invalid sample gets exactly 0 and does not enter any statistics, whatever its
reward is (NaN included). A sample without another one to compare with gets 0. Results are float32
of shape (N,). ``ValueError`` is raised when lengths differ or a valid reward is not finite. Steps
are not read: splitting a step changes nothing but the reward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STD_EPS = 1e-6
"""Added to a group's unbiased standard deviation. verl uses 1e-6 and TRL 1e-4."""


def group_advantages(
    rewards_N: torch.Tensor,
    groups: Sequence[int],
    valid_N: torch.Tensor,
    *,
    std_normalize: bool,
    eps: float = STD_EPS,
) -> torch.Tensor:
    """Return ``A_i = (r_i - mean_g) / (std_g + eps)`` over the valid members of i's group g.

    ``std_g`` is unbiased (n - 1); without ``std_normalize`` nothing is divided. Groups may differ in
    size and be interleaved, so fanned-out or filtered batches keep their meaning; a reshape by a
    fixed group size would silently mix prompts. Source: DeepSeekMath, arXiv 2402.03300, section
    4.1.2.
    """
    rewards_N, valid_N = _checked(rewards_N, groups, valid_N)
    group_N, count_G = _group_counts(groups, valid_N)
    mean_G = _group_sum(rewards_N, group_N, count_G) / count_G.clamp(min=1)
    centred_N = (rewards_N - mean_G[group_N]) * valid_N
    if std_normalize:
        std_G = (
            _group_sum(centred_N.square(), group_N, count_G) / (count_G - 1).clamp(min=1)
        ).sqrt()
        centred_N = centred_N / (std_G + eps)[group_N]
    comparable_N = valid_N & (count_G[group_N] >= 2)
    return torch.where(comparable_N, centred_N, 0.0).to(torch.float32)


def rloo_advantages(
    rewards_N: torch.Tensor, groups: Sequence[int], valid_N: torch.Tensor
) -> torch.Tensor:
    """Return ``A_i = r_i - mean_{j != i} r_j`` over the other valid members of the group.

    Leave-one-out is GRPO without the std times n / (n - 1), so the choice matters in groups of
    different sizes. Source: arXiv 2402.14740, equation 8.
    """
    rewards_N, valid_N = _checked(rewards_N, groups, valid_N)
    group_N, count_G = _group_counts(groups, valid_N)
    others_N = count_G[group_N] - 1
    mean_N = (_group_sum(rewards_N, group_N, count_G)[group_N] - rewards_N) / others_N.clamp(min=1)
    return torch.where(valid_N & (others_N >= 1), rewards_N - mean_N, 0.0).to(torch.float32)


def global_advantages(
    rewards_N: torch.Tensor,
    groups: Sequence[int],
    valid_N: torch.Tensor,
    *,
    eps: float = STD_EPS,
) -> torch.Tensor:
    """Return ``A_i = (r_i - mean) / (std + eps)`` over the batch's valid samples (REINFORCE++).

    The statistics count every response once; verl counts every token, which lets long responses set
    the mean. The KL penalty inside the reward is left out: KL is a loss here. Source: arXiv
    2501.03262, global advantage normalization.
    """
    rewards_N, valid_N = _checked(rewards_N, groups, valid_N)
    return group_advantages(rewards_N, [0] * len(groups), valid_N, std_normalize=True, eps=eps)


def estimate_advantages(
    estimator: str,
    rewards_N: torch.Tensor,
    groups: Sequence[int],
    valid_N: torch.Tensor,
    *,
    std_normalize: bool = True,
) -> torch.Tensor:
    """Return the advantages of ``rl.estimator``; only grpo reads ``std_normalize``.

    * grpo: ``group_advantages``.
    * dr_grpo: ``r_i - mean_g``; a std would weigh a prompt by how easy it is. Source: arXiv
      2503.20783, whose other half is the constant length normalization of the loss
      (``rl.loss.aggregation=length_constant``).
    * rloo: ``rloo_advantages``. reinforce_pp: ``global_advantages``.
    """
    match estimator:
        case "grpo":
            return group_advantages(rewards_N, groups, valid_N, std_normalize=std_normalize)
        case "dr_grpo":
            return group_advantages(rewards_N, groups, valid_N, std_normalize=False)
        case "rloo":
            return rloo_advantages(rewards_N, groups, valid_N)
        case "reinforce_pp":
            return global_advantages(rewards_N, groups, valid_N)
    raise ValueError(f"estimator={estimator!r}: choose grpo, dr_grpo, rloo or reinforce_pp")


def _checked(
    rewards_N: torch.Tensor,
    groups: Sequence[int],
    valid_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards in float64 with 0 where not valid, and the flags as bool."""
    if not len(groups) == rewards_N.numel() == valid_N.numel():
        raise ValueError(
            f"advantages: {rewards_N.numel()} rewards, {len(groups)} group ids, "
            f"{valid_N.numel()} valid flags: must be equally many"
        )
    valid_N = valid_N.to(torch.bool)
    rewards_N = torch.where(valid_N, rewards_N.to(torch.float64), 0.0)
    if not torch.isfinite(rewards_N).all():
        raise ValueError(
            "advantages: a valid sample has a reward that is not finite; mark it invalid instead"
        )
    return rewards_N, valid_N


def _group_counts(
    groups: Sequence[int], valid_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's group as an index (N,) and the number of valid members of each group (G,)."""
    _, group_N = torch.unique(torch.tensor(list(groups), dtype=torch.int64), return_inverse=True)
    num_groups = int(group_N.max()) + 1 if len(groups) else 0
    return group_N, torch.zeros(num_groups, dtype=torch.float64).index_add_(
        0, group_N, valid_N.to(torch.float64)
    )


def _group_sum(
    values_N: torch.Tensor, group_N: torch.Tensor, count_G: torch.Tensor
) -> torch.Tensor:
    return torch.zeros_like(count_G).index_add_(0, group_N, values_N)
