"""Which batch the loop of stage III trains on next: made when it is asked for, or one step ahead."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from spark_nemo.config import SparkConfig
from spark_nemo.engines.async_utils import BackgroundWork, run_async
from spark_nemo.megatron.process_groups import on_main_rank
from spark_nemo.records import Problem
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.dynamic_sampling import max_prompts
from spark_nemo.rollout.manager import RolloutManager
from spark_nemo.rollout.prefetched_batch import IN_FLIGHT, batch_from_bytes, batch_to_bytes
from spark_nemo.training.fine_tuning import batch_indices

log = logging.getLogger(__name__)


class RolloutPrefetcher:
    """Every rank has one; only the main rank has a session, whose batches all ranks get. A context
    manager: leaving it ends what is still being generated.

    With ``rl.rollout.one_step_off`` the loop is ``take`` (this step's batch; the next one is
    begun), train, ``settle`` (the next one is there). Between the two no other call may use the
    engines. ``cursor`` counts the prompts that dynamic sampling has used up, those of the batch
    ahead included.
    """

    def __init__(
        self, config: SparkConfig, problems: Sequence[Problem], session: RolloutManager | None
    ) -> None:
        self._config, self._problems, self._session = config, problems, session
        self._work: BackgroundWork[RolloutBatch] | None = None
        self._ahead: RolloutBatch | None = None
        self._begun = False
        self.cursor = 0

    def take(self, step: int) -> RolloutBatch:
        """The batch of ``step``. Collective; raises on every rank what generating it raises."""
        batch, self._ahead = self._ahead, None
        if batch is None:
            batch = on_main_rank(
                lambda: run_async(self._open_session.batch(self._asked(step), step))
            )
            self.cursor += batch.consumed or 0
        rl = self._config.rl
        if rl.rollout.one_step_off and step + 1 < rl.steps:
            self._begun = True
            if self._session is not None:
                self._work = BackgroundWork(self._session.batch(self._asked(step + 1), step + 1))
        return batch

    def settle(self) -> None:
        """Wait for the batch that was begun, if any. Collective; raises on every rank what
        generating it raises.
        """
        if not self._begun:
            return
        self._begun = False
        self._ahead = on_main_rank(lambda: self._finished_work())
        self.cursor += self._ahead.consumed or 0

    def is_current(self, batch: RolloutBatch, step: int) -> bool:
        """Was the batch sampled with the weights that the trainer has at ``step``? Where it is
        known not to be, the first-step gate has nothing to compare.
        """
        if not self._config.rl.rollout.one_step_off:
            return True
        return all(
            version == step for rollout in batch.rollouts for version in rollout.weight_versions
        )

    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """``weight_lag``: by how many versions the weights that sampled a token are older, on
        average over tokens.
        """
        if not self._config.rl.rollout.one_step_off:
            return {}
        lags = [step - version for rollout in batch.rollouts for version in rollout.weight_versions]
        return {"weight_lag": sum(lags) / max(1, len(lags))}

    def state(self) -> dict[str, object]:
        """For the checkpoint, between ``settle`` and ``take``; the same on every rank."""
        return {"cursor": self.cursor}

    def files(self) -> dict[str, bytes]:
        """For the checkpoint, of the main rank: the batch ahead, which older weights made."""
        if self._session is None or self._ahead is None:
            return {}
        return {IN_FLIGHT: batch_to_bytes(self._ahead)}

    def restore(self, state: dict[str, object], folder: Path) -> None:
        """What ``state`` and ``files`` left in a checkpoint. Collective."""
        self.cursor = int(state.get("cursor", 0))  # type: ignore[call-overload]
        path = folder / IN_FLIGHT
        self._ahead = on_main_rank(
            lambda: batch_from_bytes(path.read_bytes()) if path.exists() else None
        )
        if self._ahead is not None:
            log.info("the next batch was in flight and is taken from the checkpoint")

    def abandon(self) -> None:
        """End what is being generated, for a run that cannot go on."""
        if self._work is not None:
            self._work.cancel()
            self._work = None

    def __enter__(self) -> RolloutPrefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abandon()

    @property
    def _open_session(self) -> RolloutManager:
        assert self._session is not None, "only the main rank generates"
        return self._session

    def _finished_work(self) -> RolloutBatch:
        assert self._work is not None, "take begins it"
        work, self._work = self._work, None
        return work.result()

    def _asked(self, step: int) -> list[Problem]:
        rl, seed = self._config.rl, self._config.run.seed
        if rl.rollout.over_sampling_ratio is None:
            indices = batch_indices(step, len(self._problems), rl.prompts_per_step, seed)
        else:
            indices = prompt_indices(self.cursor, max_prompts(rl), len(self._problems), seed)
        return [self._problems[index] for index in indices]


def prompt_indices(cursor: int, count: int, num_problems: int, seed: int) -> list[int]:
    """``count`` problems from place ``cursor`` on of all epochs' permutations, one after the other."""
    epochs = range(cursor // num_problems, (cursor + count - 1) // num_problems + 1)
    order = [
        index
        for epoch in epochs
        for index in batch_indices(epoch, num_problems, num_problems, seed)
    ]
    start = cursor % num_problems
    return order[start : start + count]
