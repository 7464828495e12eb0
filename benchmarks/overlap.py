"""Measure how much of an RL step's verification is hidden, and what a step then takes.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py [--steps 6] [--repeats 3] [--rows 64] \\
        [--elsewhere SECONDS]

Three schedules make the same steps of stage III on the toy task's models (embedded engines,
Megatron trainer, in-process weight sync), interleaved, one after the other in this process:

* ``no overlap``    every response is generated first, then all are verified, then the step trains;
* ``streaming``     a response is verified as soon as it is finished (the default of stage III);
* ``one step off``  streaming, and the next batch is made while this one trains
  (``rl.rollout.one_step_off``).

Definition. A verification lasts from the end of its response to its verdict. V is the set of
moments with at least one verification of the step's batch, G the moments at which a response of any
batch is generated, T those at which the trainer trains. The hidden share is |V and (G or T)| / |V|,
summed over the steps but the first (``rollout/timeline.py``). The rest is time in which the whole
run waits for verifications alone. In ``no overlap`` a verification starts after the last response.

Hidden is not free: with embedded engines verifier, policy and trainer share this machine's
processors, and the two engines one thread. ``--elsewhere 1.0`` replaces the verifier by a stand-in
that takes this long for each verification and no processor time, like a pool of servers. Then the
step time shows the gain.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from spark_nemo.config import SparkConfig
from spark_nemo.config.hacking import ConstraintsConfig
from spark_nemo.config.rollout import RolloutConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import FormatViolation, Rollout, RolloutVerdict, Verdict, derive_seed
from spark_nemo.records.problems import read_problems
from spark_nemo.rewards.hacking.constraints import read_response
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rollout.engines import RolloutEngines
from spark_nemo.rollout.timeline import TRAIN, VERIFY, Timeline, seconds
from spark_nemo.rollout.worker import RolloutWorker
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import ASSETS, resolve_toy
from spark_nemo.training.grpo_trainer import GRPOTrainer
from spark_nemo.weight_sync.synchronizer import WeightSync

SCHEDULES = ("no overlap", "streaming", "one step off")
TARGET = 0.8


@dataclass
class Elsewhere:
    """A verifier of ``latency`` seconds that uses none of this machine; its verdicts are coins."""

    service: object
    latency: float

    async def judge(self, rollout: Rollout) -> RolloutVerdict:
        """Check the format, then wait."""
        parsed = read_response(rollout, ConstraintsConfig())
        if isinstance(parsed, FormatViolation):
            return RolloutVerdict(parsed, None)
        await asyncio.sleep(self.latency)
        yes = derive_seed(rollout.text) % 2 == 0
        return RolloutVerdict(None, Verdict((True,) * len(parsed.steps), yes), 0)


@dataclass
class Afterwards:
    """A judge that waits for all responses of the batch, and records when it worked."""

    inner: RewardJudge | Elsewhere
    responses: int
    waiting: int = 0
    intervals: list[tuple[float, float]] = field(default_factory=list)
    all_finished: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def service(self) -> object:
        """The inner judge's service."""
        return self.inner.service

    async def judge(self, rollout: Rollout) -> RolloutVerdict:
        """Wait for the other responses, then judge."""
        self.waiting += 1
        if self.waiting == self.responses:
            self.waiting = 0
            self.all_finished.set()
            self.all_finished = asyncio.Event()
        else:
            await self.all_finished.wait()
        start = time.perf_counter()
        try:
            return await self.inner.judge(rollout)
        finally:
            self.intervals.append((start, time.perf_counter()))


class Schedule:
    """One way of scheduling, with engines and a trainer of its own."""

    def __init__(self, name: str, config: SparkConfig, folder: Path, latency: float | None) -> None:
        rollout = RolloutConfig(one_step_off=name == "one step off")
        self.config = config = replace(config, rl=replace(config.rl, rollout=rollout))
        engines = RolloutEngines.load(config, folder)
        judge = engines.judge
        if latency is not None:
            judge = Elsewhere(judge.service, latency)
        self.afterwards = Afterwards(judge, config.rl.prompts_per_step * config.rl.group_size)
        if name == "no overlap":
            judge = self.afterwards
        self.timeline = Timeline()
        problems = read_problems(config.data.rl_problems)
        self.rollouts = RolloutWorker(config, problems, folder, self.timeline, engines)
        self.rollouts.generator = replace(self.rollouts.generator, judge=judge)
        worker = MegatronWorker.from_hf(
            config.models.policy, config.megatron, 0, config.rl.optimizer, config.rl.steps
        )
        self.trainer = GRPOTrainer(worker, config.rl, config.megatron.tokens_per_micro_batch)
        self.sync = WeightSync.build(config.weight_sync, worker, engine_kind="local", folder=folder)
        self.name = name
        self.seconds: list[float] = []
        self.verified = 0.0
        self.hidden = 0.0
        self.tokens = 0

    def step(self, step: int) -> None:
        """Make a step of stage III, without saving and evaluating, and record its seconds."""
        start = time.perf_counter()
        engine = self.rollouts.engines.policy.engine
        run_async(self.sync.push(self.trainer.worker, engine, step))
        batch = self.rollouts.next(step)
        with self.timeline.during(TRAIN, step):
            self.trainer.update(step, batch.rollouts)
        self.rollouts.wait()
        if step > 0:  # the first step does not have a prefetched batch
            self.seconds.append(time.perf_counter() - start)
            self.tokens += sum(len(rollout.response_ids) for rollout in batch.rollouts)
            self._count(self.timeline.row(step))
        self.afterwards.intervals.clear()
        self.timeline.forget_before(step)

    def _count(self, row: dict[str, float]) -> None:
        # Where responses wait for the last one, the timeline counts the wait too.
        if self.name == "no overlap":
            self.verified += seconds(self.afterwards.intervals)
            return
        self.verified += row[f"{VERIFY}_seconds"]
        self.hidden += row.get("verify_hidden", 0.0) * row[f"{VERIFY}_seconds"]


def configured(folder: Path, arguments: argparse.Namespace) -> SparkConfig:
    """Return the toy task's stage III without a reference model, which is not measured here."""
    return resolve_toy(
        compose_config(
            [
                "+experiment=toy",
                f"run.dir={folder}",
                f"rl.reward.model={ASSETS / 'verifier'}",
                "rl/kl=none",
                f"rl.steps={arguments.steps}",
                f"engine.max_batch_size={arguments.rows}",
                f"rl.prompts_per_step={arguments.prompts}",
                "data.rl_problems=toy:rl:200",
                "data.stage1_problems=toy:stage1:1",
                "data.eval_problems=toy:eval:1",
                "data.processbench=toy:processbench:2",
                "pipeline.rl_answers=null",
                "pipeline.rewards=[process_aware]",
            ]
        )
    )


def repeats(
    config: SparkConfig, folder: Path, arguments: argparse.Namespace
) -> Iterator[list[Schedule]]:
    """Yield the schedules of each repeat, fresh ones, after they made their steps in turns."""
    for repeat in range(arguments.repeats):
        schedules = [
            Schedule(name, config, folder / f"{repeat}-{name}", arguments.elsewhere)
            for name in SCHEDULES
        ]
        for step in range(arguments.steps):
            for schedule in schedules:
                schedule.step(step)
        yield schedules
        for schedule in schedules:
            schedule.rollouts.engines.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rows", type=int, default=64, help="requests that an engine decodes at once"
    )
    parser.add_argument(
        "--prompts", type=int, default=16, help="prompts per step, of 16 responses each"
    )
    parser.add_argument(
        "--elsewhere",
        type=float,
        default=None,
        metavar="SECONDS",
        help="a stand-in for a verifier on other machines: seconds per verification",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Schedule]] = {name: [] for name in SCHEDULES}
    with tempfile.TemporaryDirectory() as folder:
        for schedules in repeats(configured(Path(folder), arguments), Path(folder), arguments):
            for schedule in schedules:
                found[schedule.name].append(schedule)
    verifier = "embedded"
    if arguments.elsewhere is not None:
        verifier = f"elsewhere, {arguments.elsewhere:g} s each"
    print(
        f"{arguments.prompts * 16} responses per step, {arguments.rows} rows per engine, "
        f"verifier {verifier}"
    )
    report(found)


def report(found: dict[str, list[Schedule]]) -> None:
    """Print a row per schedule, and whether the target is met."""
    step_seconds = {
        name: statistics.median(seconds for each in schedules for seconds in each.seconds)
        for name, schedules in found.items()
    }
    print(
        f"{'schedule':14s} {'hidden':>8s} {'verifying s/step':>17s} {'step s':>8s} "
        f"{'against no overlap':>19s}"
    )
    for name, schedules in found.items():
        verified = sum(each.verified for each in schedules)
        hidden = sum(each.hidden for each in schedules) / verified
        num_steps = sum(len(each.seconds) for each in schedules)
        speedup = step_seconds[SCHEDULES[0]] / step_seconds[name]
        print(
            f"{name:14s} {hidden:8.1%} {verified / num_steps:17.2f} {step_seconds[name]:8.2f} "
            f"{speedup:18.2f}x"
        )
    # The last schedule of the table is the one with the target.
    result = "met" if hidden >= TARGET else "missed"
    print(f"target: at least {TARGET:.0%} hidden one step off: {result} ({hidden:.1%})")


if __name__ == "__main__":
    main()
