"""Make the batch of a step when it is needed, or one step ahead of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from spark_nemo.config import RLConfig
from spark_nemo.config.rollout import DynamicSampling
from spark_nemo.engines.async_utils import BackgroundWork, run_async
from spark_nemo.records import Problem
from spark_nemo.training.fine_tuning import batch_indices

from .batch import RolloutBatch
from .dynamic_sampling import max_prompts
from .prefetched_batch import PREFETCHED_BATCH, batch_from_bytes, batch_to_bytes

log = logging.getLogger(__name__)
GenerateBatch = Callable[[Sequence[Problem], int], Coroutine[Any, Any, RolloutBatch]]


class RolloutPrefetcher:
    """Batches in step order, on the main rank.

    ``next`` returns a step's batch. ``prefetch`` starts the following one in a background thread,
    and ``wait`` ends with it. In between, no other code may use the engines: they belong to the
    event loop that the thread runs. ``cursor`` counts the prompts that dynamic sampling has
    consumed, those of the prefetched batch included.
    """

    def __init__(
        self, config: RLConfig, seed: int, problems: Sequence[Problem], generate: GenerateBatch
    ) -> None:
        self._config = config
        self._seed = seed
        self._problems = problems
        self._generate = generate
        self._work: BackgroundWork[RolloutBatch] | None = None
        self._prefetched: RolloutBatch | None = None
        self.cursor = 0

    def next(self, step: int) -> RolloutBatch:
        """Return the batch of ``step``; raises what generating it raises."""
        batch = self._prefetched
        self._prefetched = None
        if batch is None:
            batch = run_async(self._generate(self._prompts(step), step))
            self.cursor += batch.consumed or 0
        return batch

    def prefetch(self, step: int) -> None:
        """Start to generate the batch of ``step`` in the background."""
        self._work = BackgroundWork(self._generate(self._prompts(step), step))

    def wait(self) -> None:
        """Wait for the batch in the background, if any; raises what generating it raises."""
        if self._work is None:
            return
        work = self._work
        self._work = None
        self._prefetched = work.result()
        self.cursor += self._prefetched.consumed or 0

    def cancel(self) -> None:
        """End the background generation, for a run that cannot go on."""
        if self._work is not None:
            self._work.cancel()
            self._work = None

    def files(self) -> dict[str, bytes]:
        """Return the prefetched batch for a checkpoint: the weights that made it will be gone."""
        if self._prefetched is None:
            return {}
        return {PREFETCHED_BATCH: batch_to_bytes(self._prefetched)}

    def restore(self, checkpoint: Path, cursor: int) -> None:
        """Continue from a checkpoint with the file of ``files``, if there is one."""
        self.cursor = cursor
        path = checkpoint / PREFETCHED_BATCH
        if path.exists():
            self._prefetched = batch_from_bytes(path.read_bytes())
            log.info("the next batch was prefetched before the checkpoint and is reused")

    def _prompts(self, step: int) -> list[Problem]:
        config = self._config
        if not isinstance(config.rollout.filter, DynamicSampling):
            indices = batch_indices(step, len(self._problems), config.prompts_per_step, self._seed)
        else:
            indices = prompt_indices(
                self.cursor, max_prompts(config), len(self._problems), self._seed
            )
        return [self._problems[index] for index in indices]


def prompt_indices(cursor: int, count: int, num_problems: int, seed: int) -> list[int]:
    """Return ``count`` problems from ``cursor`` on, in the permutations of all epochs in a row."""
    first_epoch = cursor // num_problems
    last_epoch = (cursor + count - 1) // num_problems
    order = []
    for epoch in range(first_epoch, last_epoch + 1):
        order += batch_indices(epoch, num_problems, num_problems, seed)
    start = cursor % num_problems
    return order[start : start + count]
