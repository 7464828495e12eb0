"""The main rank's half of stage III's rollouts: engines, generation, monitoring and files."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.config.rollout import DynamicSampling
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.base import Engine
from spark_nemo.engines.fleet import Fleet
from spark_nemo.grammar import prompt_set
from spark_nemo.records import Problem
from spark_nemo.rewards import FailureCount

from .batch import RolloutBatch
from .dynamic_sampling import dynamic_batch
from .engines import RolloutEngines
from .generator import RolloutGenerator
from .prefetch import RolloutPrefetcher
from .reward_hacking_monitor import TOP_REWARDS, RewardHackingMonitor
from .samples import SAMPLES, rewrite_rows, sample_row, sample_rows
from .timeline import Timeline

VERIFIER = "verifier.jsonl"
ROLLOUTS = "rollouts.json"


class RolloutWorker:
    """Makes the batch of every step and writes down what a person may want to see of it."""

    def __init__(
        self,
        config: SparkConfig,
        problems: Sequence[Problem],
        folder: Path,
        timeline: Timeline,
        engines: RolloutEngines,
    ) -> None:
        self._config = config
        self._folder = folder
        self.engines = engines
        self.generator = RolloutGenerator(
            policy=engines.policy,
            prompts=prompt_set(config.rl.prompt_set),
            config=config.rl,
            seed=config.run.seed,
            judge=engines.judge,
            checker=engines.checker,
            timeline=timeline,
        )
        self.monitor = RewardHackingMonitor.build(config, folder, engines)
        self._prefetcher = RolloutPrefetcher(
            config.rl, config.run.seed, problems, self.generate_batch
        )

    def next(self, step: int) -> RolloutBatch:
        """Return the batch of ``step`` and, one step off-policy, start the following one."""
        batch = self._prefetcher.next(step)
        rl = self._config.rl
        if rl.rollout.one_step_off:
            batch.metrics["weight_lag"] = weight_lag(batch, step)
        # Before the next batch starts: the held-out verifier runs on the same event loop.
        batch.metrics |= run_async(self._monitor(batch, step))
        if rl.rollout.one_step_off and step + 1 < rl.steps:
            self._prefetcher.prefetch(step + 1)
        return batch

    def wait(self) -> None:
        """Wait for the batch that ``next`` started."""
        self._prefetcher.wait()

    def cancel(self) -> None:
        """End the batch that ``next`` started."""
        self._prefetcher.cancel()

    async def generate_batch(self, problems: Sequence[Problem], step: int) -> RolloutBatch:
        """Return a scored batch; a few of its rollouts are kept for a person to read."""
        if not isinstance(self._config.rl.rollout.filter, DynamicSampling):
            batch = await self.generator.generate_batch(problems, step)
        else:
            batch = await dynamic_batch(self.generator, problems, step)
        if self.generator.judge is not None:
            # Not among the metrics: a resumed run has an empty cache and queries the verifier more
            # often, and its metrics are those of an uninterrupted run.
            counts = self.generator.judge.service.take_counts().metrics()
            rewrite_rows(self._folder / VERIFIER, step, [{"step": step, **counts}])
        rl = self._config.rl
        if step % rl.eval_every == 0 or step + 1 == rl.steps:
            rewrite_rows(self._folder / SAMPLES, step, sample_rows(batch, step))
        return batch

    def check_failures(self) -> None:
        """Raise ``FailureRateExceeded`` when the whole run's share is above the bound."""
        self.generator.failures.finish(self._config.rl.failures.max_rate)

    def on_server_return(self, restore: Callable[[Engine, int], Awaitable[None]]) -> None:
        """Give the current weights to a policy server that returns in the middle of a step."""
        engine = self.engines.policy.engine
        if isinstance(engine, Fleet):
            engine.on_return = restore

    def files(self) -> dict[str, bytes]:
        """Return the files of a checkpoint: data cursor, failures so far, prefetched batch."""
        state = {
            "cursor": self._prefetcher.cursor,
            "failures": self.generator.failures.to_json(),
        }
        return {ROLLOUTS: json.dumps(state).encode(), **self._prefetcher.files()}

    def restore(self, checkpoint: Path) -> None:
        """Continue from the files of ``files`` in a checkpoint."""
        state = json.loads((checkpoint / ROLLOUTS).read_text())
        self.generator = replace(self.generator, failures=FailureCount.from_json(state["failures"]))
        self._prefetcher.restore(checkpoint, state["cursor"])

    async def _monitor(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """Return the metrics ``hacking/...`` and write the step's highest rewards to a file."""
        metrics = await self.monitor.metrics(batch, step)
        rows = []
        for index, detectors in self.monitor.top_rewards(batch, step):
            row = sample_row(batch.rollouts[index], step)
            row["interval"] = step - step % self._config.rl.eval_every
            row["detectors"] = detectors
            rows.append(row)
        if rows:
            rewrite_rows(self._folder / TOP_REWARDS, step, rows)
        return metrics


def weight_lag(batch: RolloutBatch, step: int) -> float:
    """Return how many versions older the weights that sampled a token are, averaged over tokens."""
    lags = [step - version for rollout in batch.rollouts for version in rollout.weight_versions]
    return sum(lags) / max(1, len(lags))
