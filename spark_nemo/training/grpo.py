"""Stage III's training half: rollouts and their advantages in, optimizer steps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from spark_nemo.config import RLConfig
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
    make_grpo_loss,
)
from .packing import TrainSequence, pack_for_rank


def train_on_rollouts(
    worker: MegatronWorker,
    rollouts: Sequence[Rollout],
    advantages: Tensor | Sequence[Tensor],
    valid_N: Tensor,
    config: RLConfig,
    *,
    tokens_per_micro_batch: int,
    reference: Mapping[str, Tensor] | None = None,
    gate: FirstStepGate | None = None,
) -> dict[str, float]:
    """Make ``config.num_minibatches`` optimizer steps on one batch of rollouts and return the
    step's metrics.

    ``advantages`` has one element per rollout: a scalar (so a tensor of shape (N,) will do), which
    all of its tokens get, or a tensor [R] with one advantage per response token.

    A rollout that is not valid, or has no response token, is left out entirely: no gradient, no
    token in any mean, no KL. The others are split by groups into one part per update; a part with
    nothing left makes no step. Reference log-probabilities are computed only if the loss has a KL
    term (``reference`` is then the snapshot to compare with), old ones only if there are several
    updates: with one they are the current ones, and the pass is saved. Without a KL term, rollouts
    of advantage 0 are not computed either: they count in every mean of the loss, but add nothing to
    it (``without_idle``).

    With a ``gate``, nothing is trained unless engine and trainer agree on the computed tokens: it
    looks at the old log-probabilities when there are any, else at those of the only update, after
    its backward pass.

    Collective: every rank passes the same rollouts and trains on its own share. Metrics are the
    same on every rank: means over the computed tokens, of the updates' ``grad_norm`` and ``loss``,
    and the last ``lr``. ``valid_fraction`` is the share of rollouts not left out,
    ``computed_fraction`` that of those computed. Raises ``ValueError`` when the KL term has no
    reference or when the batch leaves nothing to train on, and the gate's ``WeightMismatch``.
    """
    if config.kl_estimator != "none" and reference is None:
        raise ValueError(
            f"rl.kl_estimator={config.kl_estimator} needs a reference snapshot: pass worker.snapshot()"
        )
    trained = [i for i, rollout in enumerate(rollouts) if bool(valid_N[i]) and rollout.response_ids]
    if not trained:
        raise ValueError(
            f"none of the {len(rollouts)} rollouts is valid and has tokens: nothing to train on"
        )
    temperature = config.sampling.temperature
    parts = _sequences_of_updates(
        [rollouts[i] for i in trained], [advantages[i] for i in trained], config
    )
    updates = [
        pack_for_rank(
            sequences, tokens_per_micro_batch, worker.dp_rank, worker.dp_size, worker.quadratic_cost
        ).micro_batches
        for sequences in parts
    ]
    if config.kl_estimator != "none":
        with worker.use_weights(dict(reference)):  # type: ignore[arg-type]
            updates = [
                _with_logprobs(worker, batches, REFERENCE_LOGPROBS, temperature)
                for batches in updates
            ]
    if len(updates) > 1:
        updates = [
            _with_logprobs(worker, batches, OLD_LOGPROBS, temperature) for batches in updates
        ]

    maxima: dict[str, Tensor] = {}
    loss_fn, check = make_grpo_loss(config, maxima), {}
    if gate is not None and len(updates) > 1:
        for batch in (batch for batches in updates for batch in batches):
            _show_gate(gate, batch.extras[OLD_LOGPROBS], batch)
        gate.decide()
    elif gate is not None:
        loss_fn, check = _watched(loss_fn, gate), {"check": gate.decide}
    train = partial(worker.train_step, temperature=temperature, with_entropy=True, **check)
    results = [train(batches, loss_fn) for batches in updates]
    return {
        **_step_metrics(results),
        **_largest({name: value.item() for name, value in maxima.items()}),
        "valid_fraction": len(trained) / len(rollouts),
        "computed_fraction": sum(map(len, parts)) / len(rollouts),
    }


def split_by_groups(groups: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of the samples in at most ``parts`` non-empty parts that keep every group whole.

    Groups are taken in order of first appearance, and parts differ by at most one group.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = list(members.values())
    bounds = [len(order) * part // parts for part in range(parts + 1)]
    split = [[index for group in order[a:b] for index in group] for a, b in pairwise(bounds)]
    return [part for part in split if part]


def _sequences_of_updates(
    rollouts: Sequence[Rollout],
    advantages: Sequence[Tensor],
    config: RLConfig,
) -> list[list[TrainSequence]]:
    """The sequences to compute of each optimizer step."""
    updates = []
    for part in split_by_groups([rollout.group for rollout in rollouts], config.num_minibatches):
        sequences = build_sequences(
            [rollouts[k] for k in part],
            [advantages[k] for k in part],
            config.aggregation,
            config.sampling.max_new_tokens,
        )
        updates.append(without_idle(sequences) if config.kl_estimator == "none" else sequences)
    return updates


def build_sequences(
    rollouts: Sequence[Rollout],
    advantages: Tensor | Sequence[Tensor],
    aggregation: str,
    max_length: int | None = None,
) -> list[TrainSequence]:
    """Training sequences of one optimizer step; the aggregation weights are those of exactly these
    rollouts.

    Raises ``ValueError`` when a rollout's advantages are neither a scalar nor one per response
    token.
    """
    weights = aggregation_weights(
        aggregation, [len(rollout.response_ids) for rollout in rollouts], max_length
    )
    return [
        TrainSequence(
            rollout.prompt_ids,
            rollout.response_ids,
            {
                ADVANTAGES: advantage.float().expand(len(rollout.response_ids))
                if advantage.dim() == 0
                else advantage,
                WEIGHTS: torch.full((len(rollout.response_ids),), weight),
                ENGINE_LOGPROBS: torch.tensor(rollout.logprobs, dtype=torch.float32),
            },
        )
        for rollout, advantage, weight in zip(rollouts, advantages, weights, strict=True)
    ]


def without_idle(sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """The sequences of one optimizer step that can move the policy, with weights that keep the
    gradient what it was.

    A sequence of advantage 0 on every token (all of a group whose rewards are equal) adds 0 to the
    loss sum, but its tokens are among the N that the sum is divided by. Leaving it out makes N
    smaller, to N'; weights times N'/N undo that exactly. When no sequence is left the shortest one
    stays, for the optimizer's step is made all the same.
    """
    live = [sequence for sequence in sequences if bool(sequence.extras[ADVANTAGES].any())]
    live = live or [min(sequences, key=lambda sequence: sequence.num_positions)]
    share = sum(len(s.response_ids) for s in live) / sum(len(s.response_ids) for s in sequences)
    return [replace(s, extras={**s.extras, WEIGHTS: s.extras[WEIGHTS] * share}) for s in live]


def _with_logprobs(
    worker: MegatronWorker,
    batches: Sequence[PackedBatch],
    name: str,
    temperature: float,
) -> list[PackedBatch]:
    return [
        replace(batch, extras={**batch.extras, name: logprobs_T[: batch.num_tokens].cpu()})
        for batch, logprobs_T in zip(batches, worker.logprobs(batches, temperature))
    ]


def _watched(loss_fn: LossFn, gate: FirstStepGate) -> LossFn:
    """``loss_fn`` that shows the gate the log-probabilities it is given."""

    def loss(
        logprobs_T: Tensor, entropy_T: Tensor | None, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _show_gate(gate, logprobs_T, batch)
        return loss_fn(logprobs_T, entropy_T, batch)

    return loss


def _show_gate(gate: FirstStepGate, logprobs_T: Tensor, batch: PackedBatch) -> None:
    gate.see(logprobs_T, batch.extras[ENGINE_LOGPROBS], batch.labels_T, batch.loss_mask_T > 0)


def _step_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    num_tokens = sum(result.num_tokens for result in results)
    means = {
        name: sum(result.metrics[name] for result in results) / num_tokens
        for name in results[0].metrics
    }
    return {
        "loss": sum(result.loss for result in results) / len(results),
        "grad_norm": sum(result.grad_norm for result in results) / len(results),
        "lr": results[-1].lr,
        "loss_tokens": num_tokens,
        **means,
    }


def _largest(maxima: dict[str, float]) -> dict[str, float]:
    gathered = gather_objects(maxima)
    names = sorted({name for part in gathered for name in part})
    return {name: max(part[name] for part in gathered if name in part) for name in names}
