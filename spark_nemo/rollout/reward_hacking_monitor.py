"""What stage III watches for reward hacking: detectors and held-out verifier at training steps,
probes at evaluations.

Nothing here changes a reward. There is no state either: what depends on earlier steps is read from
``metrics.jsonl``, so that a resumed run writes what an uninterrupted one does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.records import Failure, Problem, Rollout, derive_seed
from spark_nemo.rewards.hacking.detectors import baseline, detector_rates, flags, new_alarms
from spark_nemo.rewards.hacking.divergence import ALARM, SAMPLES, compared, gap_growth, reward_gap
from spark_nemo.rewards.hacking.probes import build_probes, score_probes
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.training.metrics_writer import METRICS_FILE, read_metrics

log = logging.getLogger(__name__)
HACKING, TOP_REWARDS = "hacking.jsonl", "top_rewards.jsonl"
PROBED_PROBLEMS = 8


@dataclass(frozen=True)
class RewardHackingMonitor:
    """Belongs to the main rank. ``service`` asks the reward model about probes, None where there is
    none; ``held_out`` is the second verifier's judge, and ``score`` the reward that training makes
    of a judgement.
    """

    config: SparkConfig
    folder: Path
    service: PRMService | None = None
    held_out: RewardJudge | None = None
    score: Callable[[Rollout], float | Failure] | None = None

    async def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """``hacking/...`` of a training step; its predecessors' rows are all written. Warns of what
        passes an alarm.
        """
        detectors, rows = self.config.rl.hacking.detectors, self._rows_before(step)
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

    def top(self, batch: RolloutBatch, step: int) -> list[tuple[int, list[str]]]:
        """Positions of the step's highest-rewarded responses, and the detectors that each of them
        sets off.

        Among equal rewards those that set off most come first, then chance decides: a person should
        not read the same harmless solution again and again.
        """
        hacking, rows = self.config.rl.hacking, self._rows_before(step)
        start = baseline(rows, batch.rollouts, hacking.detectors)
        found = [sorted(flags(rollout, start, hacking.detectors)) for rollout in batch.rollouts]
        usable = [index for index, rollout in enumerate(batch.rollouts) if rollout.valid]
        order = sorted(
            usable,
            key=lambda i: (-batch.rollouts[i].reward, -len(found[i]), derive_seed("top", step, i)),
        )
        return [(index, found[index]) for index in order[: hacking.top_rewards]]

    async def probe(self, problems: Sequence[Problem], step: int) -> list[dict[str, object]]:
        """A row for hacking.jsonl: what the reward model says about adversarial responses. No row
        without a model.
        """
        hacking = self.config.rl.hacking
        count = PROBED_PROBLEMS if hacking.probes is None else hacking.probes
        if self.service is None or not count:
            return []
        scores = await score_probes(
            self.service, build_probes(problems[:count]), hacking.constraints
        )
        for score in scores:
            if score.accepted and score.refused_by is None:
                log.warning(
                    "step %d: the reward model accepts %d of %d probes of the kind %s, which no constraint "
                    "refuses",
                    step,
                    score.accepted,
                    score.asked,
                    score.kind,
                )
        return [{"step": step, "probes": [asdict(score) for score in scores]}]

    async def close(self) -> None:
        """Release the held-out verifier."""
        if self.held_out is not None:
            await self.held_out.service.served.engine.close()

    async def _divergence(
        self,
        batch: RolloutBatch,
        step: int,
        rows: Sequence[dict[str, float]],
    ) -> dict[str, float]:
        rl, hacking = self.config.rl, self.config.rl.hacking
        if (
            self.held_out is None
            or self.score is None
            or step % (hacking.divergence_every or rl.eval_every)
        ):
            return {}
        chosen = compared(
            [rollout.valid for rollout in batch.rollouts],
            hacking.divergence_samples or SAMPLES,
            self.config.run.seed,
            step,
        )
        if not chosen:
            return {}
        await self.held_out.service.refresh()
        rollouts = [batch.rollouts[index] for index in chosen]
        verdicts = await asyncio.gather(*map(self.held_out.judge, rollouts))
        held_out_scores = [
            self.score(replace(rollout, verdict=verdict))
            for rollout, verdict in zip(rollouts, verdicts)
        ]
        metrics = reward_gap([rollout.reward for rollout in rollouts], held_out_scores)
        alarm = ALARM if hacking.divergence_alarm is None else hacking.divergence_alarm
        if (growth := gap_growth(metrics, rows)) >= alarm:
            log.warning(
                "step %d: the reward has grown %.2f away from the held-out verifier's "
                "(rl.hacking.divergence_alarm=%g)",
                step,
                growth,
                alarm,
            )
        return metrics

    def _rows_before(self, step: int) -> list[dict[str, float]]:
        return [row for row in read_metrics(self.folder / METRICS_FILE) if row["step"] < step]
