"""From a scored batch to the advantages that train: per response, or per token where step labels
say which.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from spark_nemo.config import RLConfig
from spark_nemo.records import AnswerVerdict, Verdict
from spark_nemo.rollout.generator import ScoredBatch
from spark_nemo.training.advantages import estimate_advantages
from spark_nemo.training.step_advantages import (
    ScoredResponse,
    capo_advantages,
    global_step_advantages,
    global_step_penalty_advantages,
    min_form_advantages,
    prefix_advantages,
    selective_advantages,
)

log = logging.getLogger(__name__)


def compute_advantages(batch: ScoredBatch, config: RLConfig) -> Tensor | list[Tensor]:
    """``rl.advantage`` of ``config`` for every rollout: a tensor (N,), or one tensor [R] per
    rollout.

    A pure function of the batch, so that every rank computes the same.
    """
    outcome_N = estimate_advantages(
        config.estimator,
        torch.tensor(batch.rewards.rewards),
        [rollout.group for rollout in batch.rollouts],
        torch.tensor(batch.rewards.valid),
        std_normalize=config.std_normalize is not False,
    )
    if config.advantage == "outcome":
        return outcome_N
    responses = scored_responses(batch)
    match config.advantage:
        case "selective":
            return selective_advantages(responses, outcome_N, discount=0.0)
        case "selective_half":
            return selective_advantages(responses, outcome_N, discount=0.5)
        case "global_step":
            return global_step_advantages(responses, outcome_N)
        case "global_step_penalty":
            low, high = config.step_penalty_bounds
            return global_step_penalty_advantages(
                responses, outcome_N, min_steps=low, max_steps=high
            )
        case "min_form":
            return min_form_advantages(responses)
        case "prefix":
            return prefix_advantages(responses)
        case "capo":
            return capo_advantages(responses)
    raise ValueError(f"rl.advantage={config.advantage!r}: unknown")


def scored_responses(batch: ScoredBatch) -> list[ScoredResponse]:
    """What an advantage design may know of the batch. Labels exist only where the verifier came to
    a verdict.

    A verdict whose labels do not fit the sampled steps is logged; ``ScoredResponse`` then makes no
    use of the labels. Raises ``ValueError`` for an ORM's verdict, which has none.
    """
    responses = []
    for rollout, judgement, reward, valid in zip(
        batch.rollouts, batch.judgements, batch.rewards.rewards, batch.rewards.valid, strict=True
    ):
        if isinstance(judgement.outcome, AnswerVerdict):
            raise ValueError(
                "an ORM's verdict has no step labels: an advantage per step cannot be made of it"
            )
        labels = judgement.outcome.step_labels if isinstance(judgement.outcome, Verdict) else None
        response = ScoredResponse(
            rollout.group, len(rollout.response_ids), reward, valid, rollout.step_spans, labels
        )
        if labels is not None and response.labelled_steps is None:
            log.error(
                "%s: %d step labels for %d sampled steps: not used; please report this, the parser refuses it",
                rollout.problem.problem_id,
                len(labels),
                len(rollout.step_spans),
            )
        responses.append(response)
    return responses
