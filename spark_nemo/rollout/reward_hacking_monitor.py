"""Monitor of reward hacking: detectors and a held-out verifier at training steps, probes at
evaluations.

Nothing here changes a reward or keeps state: what depends on earlier steps is read from
``metrics.jsonl``, so that a resumed run writes what an uninterrupted one does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.records import Problem, derive_seed
from spark_nemo.rewards import RewardContext, compute_scores
from spark_nemo.rewards.hacking.detectors import baseline, detector_rates, flags, new_alarms
from spark_nemo.rewards.hacking.divergence import compared, gap_growth, reward_gap
from spark_nemo.rewards.hacking.probes import build_probes, score_probes
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService
from spark_nemo.training.metrics_writer import METRICS_FILE, read_metrics

from .batch import RolloutBatch
from .engines import RolloutEngines, reward_judge
from .generator import shape_reward

log = logging.getLogger(__name__)
HACKING = "hacking.jsonl"
TOP_REWARDS = "top_rewards.jsonl"


@dataclass(frozen=True)
class RewardHackingMonitor:
    """The monitor of one run, on the main rank."""

    config: SparkConfig
    folder: Path
    probe_service: PRMService | None = None
    """Queries the reward model about probes; None without a reward model."""
    held_out: RewardJudge | None = None
    """The second verifier's judge."""

    @classmethod
    def build(
        cls, config: SparkConfig, folder: Path, engines: RolloutEngines
    ) -> RewardHackingMonitor:
        """Build the monitor over the engines of a run."""
        judge = engines.judge
        if judge is None:
            return cls(config, folder)
        # A service of its own, so that verifier.jsonl counts the rewards' verifications alone.
        probe_service = reward_judge(config, judge.service.served, judge.service.variant).service
        return cls(config, folder, probe_service, engines.held_out)

    async def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """Return ``hacking/...`` of a training step, and log what passes an alarm.

        The rows of all earlier steps must be in ``metrics.jsonl``.
        """
        detectors = self.config.rl.hacking.detectors
        rows = self._rows_before(step)
        rates = detector_rates(batch.rollouts, rows, detectors)
        for name in new_alarms(rates, rows[-1] if rows else None, detectors):
            log.warning(
                "step %d: %s in %.0f %% of the responses (rl.hacking.detectors.alarm=%g): read %s",
                step,
                name,
                100 * rates[f"hacking/{name}"],
                detectors.alarm,
                TOP_REWARDS,
            )
        return {**rates, **await self._divergence(batch, step, rows)}

    def top_rewards(self, batch: RolloutBatch, step: int) -> list[tuple[int, list[str]]]:
        """Return positions of the step's highest rewards, each with the detectors it sets off."""
        hacking = self.config.rl.hacking
        start = baseline(self._rows_before(step), batch.rollouts, hacking.detectors)
        detectors = [sorted(flags(rollout, start, hacking.detectors)) for rollout in batch.rollouts]

        def rank(index: int) -> tuple[float, int, int]:
            # Among equal rewards suspicious ones come first, then chance decides: a person should
            # not read the same harmless solution again and again.
            reward = batch.rollouts[index].reward
            return -reward, -len(detectors[index]), derive_seed("top", step, index)

        valid = [index for index, rollout in enumerate(batch.rollouts) if rollout.valid]
        best = sorted(valid, key=rank)[: hacking.top_rewards]
        return [(index, detectors[index]) for index in best]

    async def probe(self, problems: Sequence[Problem], step: int) -> list[dict[str, object]]:
        """Return the row of hacking.jsonl: the reward model's verdicts on adversarial responses.

        Empty without a reward model or with ``rl.reward.probes=0``.
        """
        reward = self.config.rl.reward
        if self.probe_service is None or not reward.probes:
            return []
        scores = await score_probes(
            self.probe_service, build_probes(problems[: reward.probes]), reward.constraints
        )
        for score in scores:
            if score.accepted and score.refused_by is None:
                log.warning(
                    "step %d: the reward model accepts %d of %d probes of the kind %s, "
                    "which no constraint rejects",
                    step,
                    score.accepted,
                    score.asked,
                    score.kind,
                )
        return [{"step": step, "probes": [asdict(score) for score in scores]}]

    async def _divergence(
        self, batch: RolloutBatch, step: int, rows: Sequence[dict[str, float]]
    ) -> dict[str, float]:
        """Return the reward gap to the held-out verifier, at the steps where it is measured."""
        rl = self.config.rl
        if self.held_out is None:
            return {}
        heldout = rl.reward.heldout
        every = rl.eval_every if heldout.every == "auto" else heldout.every
        if step % every:
            return {}
        chosen = compared(
            [rollout.valid for rollout in batch.rollouts],
            heldout.samples,
            self.config.run.seed,
            step,
        )
        if not chosen:
            return {}
        await self.held_out.service.refresh()
        rollouts = [batch.rollouts[index] for index in chosen]
        verdicts = await asyncio.gather(*map(self.held_out.judge, rollouts))
        # Shaped as in training: a penalty on one side alone would look like a closing gap.
        judged = [replace(rollout, verdict=verdict) for rollout, verdict in zip(rollouts, verdicts)]
        context = RewardContext(self.config.run.seed, step, rl.group_size)
        held_out_scores = [
            shape_reward(rl, rollout, score)
            for rollout, score in zip(judged, compute_scores(judged, rl.reward, context))
        ]
        metrics = reward_gap([rollout.reward for rollout in rollouts], held_out_scores)
        growth = gap_growth(metrics, rows)
        if growth >= heldout.alarm:
            log.warning(
                "step %d: the reward has grown %.2f away from the held-out verifier's "
                "(rl.reward.heldout.alarm=%g)",
                step,
                growth,
                heldout.alarm,
            )
        return metrics

    def _rows_before(self, step: int) -> list[dict[str, float]]:
        return [row for row in read_metrics(self.folder / METRICS_FILE) if row["step"] < step]
