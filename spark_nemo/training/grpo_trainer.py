"""The trainer of stage III: advantages, reference model and first-step gate around GRPO updates."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from spark_nemo.config import RLConfig
from spark_nemo.config.rl import KLPenalty
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import Rollout
from spark_nemo.weight_sync.logprob_gate import FirstStepGate

from .advantage_estimator import compute_advantages
from .grpo import train_on_rollouts

log = logging.getLogger(__name__)


class GRPOTrainer:
    """Trains the worker's policy on one batch per step. Every rank has one.

    Build it before a checkpoint is loaded: the reference of the KL term is the policy that the
    worker holds then, the one before any training.
    """

    def __init__(
        self,
        worker: MegatronWorker,
        config: RLConfig,
        tokens_per_micro_batch: int,
        first_step_gate: FirstStepGate | None = None,
    ) -> None:
        self.worker = worker
        self._config = config
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._gate = first_step_gate
        self._reference = worker.snapshot() if isinstance(config.kl, KLPenalty) else None

    def update(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Train on scored rollouts and return the metrics of ``train_on_rollouts``. Collective."""
        gate = self._gate
        self._gate = None  # only the first update of a process compares engine and trainer
        if gate is not None and not self._is_current(step, rollouts):
            log.info(
                "first-step gate: older weights sampled the batch of step %d, nothing is compared",
                step,
            )
            gate = None
        return train_on_rollouts(
            self.worker,
            rollouts,
            compute_advantages(rollouts, self._config),
            self._config,
            tokens_per_micro_batch=self._tokens_per_micro_batch,
            reference=self._reference,
            gate=gate,
        )

    def _is_current(self, step: int, rollouts: Sequence[Rollout]) -> bool:
        """False if older weights are known to have sampled a token."""
        if not self._config.rollout.one_step_off:
            return True
        return all(version == step for rollout in rollouts for version in rollout.weight_versions)
