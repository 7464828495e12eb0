"""Give every trainer rank the rollouts that the main rank generated, as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spark_nemo.megatron.process_groups import broadcast_object, broadcast_tensors, rank, world_size
from spark_nemo.records import Problem, Rollout, RolloutVerdict, TokenSpan, Verdict

from .batch import RolloutBatch

NO_LABELS = -1


def broadcast_batch(batch: RolloutBatch | None, problems: Sequence[Problem]) -> RolloutBatch:
    """Return the main rank's batch on every rank. Collective.

    The other ranks get what training reads: token ids, log-probabilities, weight versions, groups,
    rewards and step labels. Texts, parses and failed verdicts stay on the main rank. ``problems``
    are the run's, the same list on every rank.
    """
    if world_size() == 1:
        return batch
    metrics = broadcast_object(batch.metrics if batch is not None else None)
    tensors = broadcast_tensors(to_tensors(batch.rollouts, problems) if batch is not None else None)
    if rank() == 0:
        return batch
    return RolloutBatch(from_tensors(tensors, problems), metrics)


def to_tensors(rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> dict[str, Tensor]:
    """Return what training reads of the rollouts: a row of counts each, and flat values."""
    problem_index = {problem.problem_id: index for index, problem in enumerate(problems)}
    counts: list[list[int]] = []
    tokens: list[int] = []
    weight_versions: list[int] = []
    span_bounds: list[int] = []
    step_labels: list[bool] = []
    logprobs: list[float] = []
    for rollout in rollouts:
        outcome = rollout.verdict.outcome if rollout.verdict is not None else None
        labels = outcome.step_labels if isinstance(outcome, Verdict) else None
        counts.append(
            [
                problem_index[rollout.problem.problem_id],
                rollout.group,
                len(rollout.prompt_ids),
                len(rollout.response_ids),
                len(rollout.step_spans),
                NO_LABELS if labels is None else len(labels),
                labels is not None and outcome.answer_correct,
                rollout.valid,
            ]
        )
        tokens += rollout.prompt_ids
        tokens += rollout.response_ids
        weight_versions += rollout.weight_versions
        logprobs += rollout.logprobs
        for span in rollout.step_spans:
            span_bounds += (span.start, span.end)
        step_labels += labels or ()
    return {
        "counts": torch.tensor(counts, dtype=torch.int64),
        "tokens": torch.tensor(tokens, dtype=torch.int64),
        "weight_versions": torch.tensor(weight_versions, dtype=torch.int64),
        "span_bounds": torch.tensor(span_bounds, dtype=torch.int64),
        "step_labels": torch.tensor(step_labels, dtype=torch.int64),
        # Python's floats, so that every rank computes with the very numbers of the main rank.
        "logprobs": torch.tensor(logprobs, dtype=torch.float64),
        "rewards": torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
    }


def from_tensors(tensors: dict[str, Tensor], problems: Sequence[Problem]) -> list[Rollout]:
    """Rebuild the rollouts of ``to_tensors``, with empty texts."""
    tokens = _Reader(tensors["tokens"])
    weight_versions = _Reader(tensors["weight_versions"])
    span_bounds = _Reader(tensors["span_bounds"])
    step_labels = _Reader(tensors["step_labels"])
    logprobs = _Reader(tensors["logprobs"])
    rollouts = []
    for row, reward in zip(tensors["counts"].tolist(), tensors["rewards"].tolist(), strict=True):
        problem, group, num_prompt, num_response, num_spans, num_labels, answer, valid = row
        bounds = span_bounds.take(2 * num_spans)
        verdict = None
        if num_labels != NO_LABELS:
            labels = tuple(bool(label) for label in step_labels.take(num_labels))
            verdict = RolloutVerdict(None, Verdict(labels, bool(answer)))
        rollouts.append(
            Rollout(
                problem=problems[problem],
                group=group,
                prompt_ids=tokens.take(num_prompt),
                response_ids=tokens.take(num_response),
                logprobs=logprobs.take(num_response),
                weight_versions=weight_versions.take(num_response),
                text="",
                finish_reason="",
                step_spans=tuple(map(TokenSpan, bounds[::2], bounds[1::2])),
                verdict=verdict,
                reward=reward,
                valid=bool(valid),
            )
        )
    return rollouts


class _Reader:
    """A flat tensor, read from its beginning."""

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat
        self._position = 0

    def take(self, count: int) -> tuple:
        """Return the next ``count`` values."""
        start = self._position
        self._position += count
        return tuple(self._flat[start : self._position].tolist())
