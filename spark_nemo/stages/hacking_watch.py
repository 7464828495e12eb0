"""What stage III watches for reward hacking: detector rates and top samples of every step, probes at evaluations."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.rewards.hacking.detectors import detector_rates, new_alarms
from spark_nemo.stages.rollouts import ScoredBatch
from spark_nemo.training.metrics import METRICS_FILE, read_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HackingWatch:
    """Belongs to the main rank. Holds no state: what depends on earlier steps is read from ``metrics.jsonl``."""

    config: SparkConfig
    folder: Path

    async def step(self, batch: ScoredBatch, step: int) -> dict[str, float]:
        """The metrics ``hacking/...`` of a training step whose predecessors' rows are all written."""
        detectors = self.config.rl.hacking.detectors
        rows = [row for row in read_metrics(self.folder / METRICS_FILE) if row["step"] < step]
        rates = detector_rates(batch.rollouts, rows, detectors)
        for name in new_alarms(rates, rows[-1] if rows else None, detectors):
            log.warning("step %d: %s in %.0f %% of the responses (rl.hacking.detectors.alarm=%g): read top_rewards.jsonl",
                        step, name, 100 * rates[f"hacking/{name}"], detectors.alarm)
        return rates
