"""One GRPO step: rollouts and their advantages in, optimizer steps and metrics out.

The loss itself is ``grpo_loss.grpo_loss``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from spark_nemo.config import RLConfig
from spark_nemo.config.rl import KLPenalty
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.process_groups import gather_objects
from spark_nemo.megatron.worker import LossFn, MegatronWorker, StepResult
from spark_nemo.records import Rollout
from spark_nemo.weight_sync.logprob_gate import FirstStepGate

from .grpo_loss import (
    ADVANTAGES,
    ENGINE_LOGPROBS,
    OLD_LOGPROBS,
    REFERENCE_LOGPROBS,
    WEIGHTS,
    aggregation_weights,
    grpo_loss,
)
from .packing import TrainSequence, pack_for_rank


def train_on_rollouts(
    worker: MegatronWorker,
    rollouts: Sequence[Rollout],
    advantages: Tensor | Sequence[Tensor],
    config: RLConfig,
    *,
    tokens_per_micro_batch: int,
    reference: Mapping[str, Tensor] | None = None,
    gate: FirstStepGate | None = None,
) -> dict[str, float]:
    """Make ``config.loss.num_minibatches`` optimizer steps on one batch and return its metrics.

    ``advantages`` has one element per rollout: a scalar for all of its tokens, or a tensor [R] with
    one advantage per response token. ``reference`` is the ``worker.snapshot()`` that the KL term
    compares with. A ``gate`` compares engine and trainer log-probabilities before the first weight
    changes.

    A rollout that is invalid or has no response token is left out of everything: gradient, token
    counts, KL. The rest is split by groups into minibatches, one optimizer step each; an empty
    minibatch makes no step. Without a KL term, zero-advantage rollouts are not computed either
    (``drop_zero_advantages``).

    Collective: every rank passes the same rollouts and trains on its own share. The metrics are the
    same on every rank: means over the computed tokens, means over minibatches of ``grad_norm`` and
    ``loss``, and the last ``lr``. ``valid_fraction`` is the share of rollouts that were not left
    out, ``computed_fraction`` the share that was computed.

    Raises ``ValueError`` when the KL term has no reference or nothing is left to train on, and
    ``WeightMismatch`` from the gate.
    """
    has_kl = isinstance(config.kl, KLPenalty)
    if has_kl and reference is None:
        raise ValueError(
            f"rl/kl={config.kl.name}: the reference snapshot is missing; pass "
            "reference=worker.snapshot()"
        )
    kept = [i for i, rollout in enumerate(rollouts) if rollout.valid and rollout.response_ids]
    if not kept:
        raise ValueError(
            f"none of the {len(rollouts)} rollouts is valid and has tokens; nothing to train on"
        )
    minibatches = _minibatches([rollouts[i] for i in kept], [advantages[i] for i in kept], config)
    packed = [
        pack_for_rank(
            sequences, tokens_per_micro_batch, worker.dp_rank, worker.dp_size, worker.quadratic_cost
        ).micro_batches
        for sequences in minibatches
    ]
    temperature = config.sampling.temperature
    if has_kl:
        with worker.use_weights(dict(reference)):  # type: ignore[arg-type]
            packed = [
                _with_logprobs(worker, micro_batches, REFERENCE_LOGPROBS, temperature)
                for micro_batches in packed
            ]
    # The old policy is the one before the first minibatch's step. With one minibatch its
    # log-probabilities are the current ones, and their forward pass is saved.
    if len(packed) > 1:
        packed = [
            _with_logprobs(worker, micro_batches, OLD_LOGPROBS, temperature)
            for micro_batches in packed
        ]

    running_max: dict[str, Tensor] = {}
    loss_fn: LossFn = partial(grpo_loss, config=config, running_max=running_max)
    check = {}
    if gate is not None and len(packed) > 1:
        for micro_batches in packed:
            for batch in micro_batches:
                _observe(gate, batch.extras[OLD_LOGPROBS], batch)
        gate.decide()
    elif gate is not None:
        # The only minibatch's log-probabilities come from its training forward pass; the worker
        # calls ``check`` after it, before it changes the weights.
        loss_fn = _observed(loss_fn, gate)
        check = {"check": gate.decide}
    results = [
        worker.train_step(micro_batches, loss_fn, temperature, with_entropy=True, **check)
        for micro_batches in packed
    ]
    metrics = _mean_metrics(results)
    metrics |= _max_over_ranks({name: value.item() for name, value in running_max.items()})
    metrics["valid_fraction"] = len(kept) / len(rollouts)
    metrics["computed_fraction"] = sum(map(len, minibatches)) / len(rollouts)
    return metrics


def build_sequences(
    rollouts: Sequence[Rollout],
    advantages: Tensor | Sequence[Tensor],
    aggregation: str,
    max_length: int | None = None,
) -> list[TrainSequence]:
    """Return the training sequences of one optimizer step on exactly these rollouts.

    The aggregation weights depend on all of them. Raises ``ValueError`` when a rollout's advantages
    are neither a scalar nor one per response token.
    """
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    weights = aggregation_weights(aggregation, lengths, max_length)
    sequences = []
    for rollout, length, advantage, weight in zip(
        rollouts, lengths, advantages, weights, strict=True
    ):
        extras = {
            ADVANTAGES: advantage.float().expand(length) if advantage.dim() == 0 else advantage,
            WEIGHTS: torch.full((length,), weight),
            ENGINE_LOGPROBS: torch.tensor(rollout.logprobs, dtype=torch.float32),
        }
        sequences.append(TrainSequence(rollout.prompt_ids, rollout.response_ids, extras))
    return sequences


def drop_zero_advantages(sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Return the sequences that can move the policy, reweighted to keep the gradient.

    A sequence whose advantages are all 0 (every group with equal rewards) adds 0 to the loss sum,
    but its tokens count in N, which the sum is divided by. Without it N becomes N', so the weights
    are multiplied by N'/N. At least the shortest sequence stays: the optimizer step is made anyway.
    """
    live = [sequence for sequence in sequences if bool(sequence.extras[ADVANTAGES].any())]
    if not live:
        live = [min(sequences, key=lambda sequence: sequence.num_positions)]
    share = sum(len(s.response_ids) for s in live) / sum(len(s.response_ids) for s in sequences)
    return [replace(s, extras={**s.extras, WEIGHTS: s.extras[WEIGHTS] * share}) for s in live]


def split_by_groups(groups: Sequence[int], parts: int) -> list[list[int]]:
    """Return sample indices in at most ``parts`` non-empty parts that keep every group whole.

    Groups keep the order of their first appearance; parts differ by at most one group.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = list(members.values())
    bounds = [len(order) * part // parts for part in range(parts + 1)]
    split = [[index for group in order[a:b] for index in group] for a, b in pairwise(bounds)]
    return [part for part in split if part]


def _minibatches(
    rollouts: Sequence[Rollout], advantages: Sequence[Tensor], config: RLConfig
) -> list[list[TrainSequence]]:
    """Return the sequences to compute, one list per optimizer step."""
    minibatches = []
    for part in split_by_groups(
        [rollout.group for rollout in rollouts], config.loss.num_minibatches
    ):
        sequences = build_sequences(
            [rollouts[i] for i in part],
            [advantages[i] for i in part],
            config.aggregation,
            config.sampling.max_new_tokens,
        )
        if not isinstance(config.kl, KLPenalty):
            sequences = drop_zero_advantages(sequences)
        minibatches.append(sequences)
    return minibatches


def _with_logprobs(
    worker: MegatronWorker, micro_batches: Sequence[PackedBatch], name: str, temperature: float
) -> list[PackedBatch]:
    """Add the log-probabilities under the worker's present weights as the extra ``name``."""
    return [
        replace(batch, extras={**batch.extras, name: logprobs_T[: batch.num_tokens].cpu()})
        for batch, logprobs_T in zip(micro_batches, worker.logprobs(micro_batches, temperature))
    ]


def _observed(loss_fn: LossFn, gate: FirstStepGate) -> LossFn:
    """Return ``loss_fn`` that also passes its log-probabilities to the gate."""

    def observed_loss(
        logprobs_T: Tensor, entropy_T: Tensor | None, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _observe(gate, logprobs_T, batch)
        return loss_fn(logprobs_T, entropy_T, batch)

    return observed_loss


def _observe(gate: FirstStepGate, logprobs_T: Tensor, batch: PackedBatch) -> None:
    gate.observe(logprobs_T, batch.extras[ENGINE_LOGPROBS], batch.labels_T, batch.loss_mask_T > 0)


def _mean_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    num_tokens = sum(result.num_tokens for result in results)
    metrics = {
        "loss": sum(result.loss for result in results) / len(results),
        "grad_norm": sum(result.grad_norm for result in results) / len(results),
        "lr": results[-1].lr,
        "loss_tokens": num_tokens,
    }
    for name in results[0].metrics:
        metrics[name] = sum(result.metrics[name] for result in results) / num_tokens
    return metrics


def _max_over_ranks(maxima: dict[str, float]) -> dict[str, float]:
    # A rank without work, and all pipeline stages but the last, have no maxima.
    gathered = gather_objects(maxima)
    names = sorted({name for part in gathered for name in part})
    return {name: max(part[name] for part in gathered if name in part) for name in names}
