"""One training step's rollouts and their metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.records import Rollout, Verdict


@dataclass(slots=True)
class RolloutBatch:
    """The scored rollouts of one step, whole groups in order.

    ``consumed`` counts the prompts that dynamic sampling took from the data; None without dynamic
    sampling, where every prompt is one group of the batch.
    """

    rollouts: list[Rollout]
    metrics: dict[str, float]
    consumed: int | None = None


def batch_metrics(rollouts: Sequence[Rollout], failure_rates: dict[str, float]) -> dict[str, float]:
    """Return means over the batch, as fractions or tokens.

    ``failure/...`` are shares of the verifications. ``correct_step_fraction`` is omitted when no
    step was labelled (an ORM, a baseline, no verdict at all); 0 would be misleading.
    """
    size = len(rollouts)
    valid_rewards = [rollout.reward for rollout in rollouts if rollout.valid]
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    verdicts = [rollout.verdict for rollout in rollouts if rollout.verdict is not None]
    violations = Counter(
        verdict.violation.rule for verdict in verdicts if verdict.violation is not None
    )
    step_labels = [
        label
        for verdict in verdicts
        if isinstance(verdict.outcome, Verdict)
        for label in verdict.outcome.step_labels
    ]

    metrics = {
        "reward": sum(valid_rewards) / max(1, len(valid_rewards)),
        "valid_fraction": len(valid_rewards) / size,
        "response_tokens": num_tokens / size,
        "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / size,
        "steps_per_response": sum(len(r.step_spans) for r in rollouts) / size,
        "format_violations": violations.total() / size,
        "failure_rate": sum(failure_rates.values()),
    }
    if step_labels:
        metrics["correct_step_fraction"] = sum(step_labels) / len(step_labels)
    metrics["sampled_tokens"] = float(num_tokens)
    metrics["verifier_tokens"] = float(sum(verdict.num_tokens for verdict in verdicts))
    for kind, rate in failure_rates.items():
        metrics[f"failure/{kind}"] = rate
    for rule, count in sorted(violations.items()):
        metrics[f"violation/{rule}"] = count / size
    return metrics
