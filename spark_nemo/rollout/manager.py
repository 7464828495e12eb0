"""Rollouts as every trainer rank sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from spark_nemo.config import SparkConfig
from spark_nemo.engines.base import Engine
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.megatron.process_groups import only_on_main_rank
from spark_nemo.records import Problem

from .batch import RolloutBatch
from .broadcast import broadcast_batch
from .engines import RolloutEngines
from .timeline import Timeline
from .worker import RolloutWorker

T = TypeVar("T")


class RolloutManager:
    """The same object on every rank; engines, texts and files are the main rank's alone.

    ``next``, ``wait``, ``check_failures`` and ``restore`` are collective and raise the main rank's
    error on every rank. The other methods do nothing on the other ranks.
    """

    def __init__(
        self,
        config: SparkConfig,
        problems: Sequence[Problem],
        folder: Path,
        timeline: Timeline,
        verifier: ServedModel | None = None,
    ) -> None:
        """Load the engines; a ``verifier`` that is given takes the reward model's place."""
        self._problems = problems

        def open_worker() -> RolloutWorker:
            engines = RolloutEngines.load(config, folder, verifier)
            return RolloutWorker(config, problems, folder, timeline, engines)

        self.worker: RolloutWorker | None = only_on_main_rank(open_worker)

    @property
    def policy_engine(self) -> Engine | None:
        """The engine that gets new weights; None off the main rank."""
        return self.worker.engines.policy.engine if self.worker is not None else None

    def next(self, step: int) -> RolloutBatch:
        """Return the batch of ``step``; with ``one_step_off`` also start the following batch.

        From then until ``wait`` returns, no other call may use the engines.
        """
        batch = self._on_main_rank(lambda worker: worker.next(step))
        return broadcast_batch(batch, self._problems)

    def wait(self) -> None:
        """Wait for the batch that ``next`` started."""
        self._on_main_rank(RolloutWorker.wait)

    def cancel(self) -> None:
        """End the batch that ``next`` started, for a run that cannot go on."""
        if self.worker is not None:
            self.worker.cancel()

    def check_failures(self) -> None:
        """Raise ``FailureRateExceeded`` when the whole run's share is above the bound."""
        self._on_main_rank(RolloutWorker.check_failures)

    def on_server_return(self, restore: Callable[[Engine, int], Awaitable[None]]) -> None:
        """Give the current weights to a policy server that returns in the middle of a step."""
        if self.worker is not None:
            self.worker.on_server_return(restore)

    def files(self) -> dict[str, bytes]:
        """Return the main rank's files of a checkpoint; empty on the other ranks."""
        return self.worker.files() if self.worker is not None else {}

    def restore(self, checkpoint: Path) -> None:
        """Continue from the files in a checkpoint."""
        self._on_main_rank(lambda worker: worker.restore(checkpoint))

    def decode_token(self, token_id: int) -> str:
        """Return the text of a token; off the main rank, where no message is written, its id."""
        if self.worker is None:
            return str(token_id)
        return self.worker.engines.policy.tokenizer.decode_response((token_id,))

    def close(self) -> None:
        """Release the engines."""
        if self.worker is not None:
            self.worker.engines.close()

    def _on_main_rank(self, action: Callable[[RolloutWorker], T]) -> T | None:
        return only_on_main_rank(lambda: action(self.worker))
