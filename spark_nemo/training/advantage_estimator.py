"""Advantages of a batch: one per response, or one per token where step labels say which."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from spark_nemo.config import RLConfig
from spark_nemo.config.registry import option
from spark_nemo.records import AnswerVerdict, Rollout, Verdict

from .advantages import estimate_advantages
from .step_advantages import ScoredResponse

log = logging.getLogger(__name__)


def compute_advantages(rollouts: Sequence[Rollout], config: RLConfig) -> Tensor | list[Tensor]:
    """Return ``rl.advantage`` of scored rollouts: a tensor (N,), or one tensor [R] per rollout.

    A pure function of the rollouts, so that every rank computes the same.
    """
    if config.advantage.name == "outcome":
        return _outcome_advantages(rollouts, config)
    advantage = option("rl/advantage", config.advantage.name)
    assert advantage.function is not None, f"rl/advantage={config.advantage.name} has no function"
    uses_estimator = config.estimator.name != "none"
    outcome_N = _outcome_advantages(rollouts, config) if uses_estimator else None
    return advantage.function(scored_responses(rollouts), outcome_N, config.advantage)


def _outcome_advantages(rollouts: Sequence[Rollout], config: RLConfig) -> Tensor:
    return estimate_advantages(
        config.estimator.name,
        torch.tensor([rollout.reward for rollout in rollouts]),
        [rollout.group for rollout in rollouts],
        torch.tensor([rollout.valid for rollout in rollouts]),
        std_normalize=getattr(config.estimator, "std_normalize", False),
    )


def scored_responses(rollouts: Sequence[Rollout]) -> list[ScoredResponse]:
    """Return what an advantage design may know of the rollouts.

    Labels whose number is not that of the sampled steps are logged, and ``ScoredResponse`` does not
    use them. Raises ``ValueError`` for an ORM's verdict, which does not have step labels.
    """
    responses = []
    for rollout in rollouts:
        outcome = rollout.verdict.outcome if rollout.verdict is not None else None
        if isinstance(outcome, AnswerVerdict):
            raise ValueError(
                "an ORM's verdict has no step labels: an advantage per step cannot be computed"
            )
        labels = outcome.step_labels if isinstance(outcome, Verdict) else None
        response = ScoredResponse(
            group=rollout.group,
            num_tokens=len(rollout.response_ids),
            reward=rollout.reward,
            valid=rollout.valid,
            step_spans=rollout.step_spans,
            step_labels=labels,
        )
        if labels is not None and response.labelled_steps is None:
            log.error(
                "%s: %d step labels for %d sampled steps: not used; please report this, "
                "the parser rejects it",
                rollout.problem.problem_id,
                len(labels),
                len(rollout.step_spans),
            )
        responses.append(response)
    return responses
