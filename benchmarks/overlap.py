"""How much of the verification time of an RL step is hidden, and what a step then takes.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py [--steps 6] [--repeats 3] [--rows 64] [--elsewhere SECONDS]

Three arms make the same steps of stage III on the small world's models (embedded engines, Megatron
trainer, in-process weight sync), interleaved, one after the other in this process:

* ``no overlap``    every response is generated first, then all are verified, then the step trains;
* ``streaming``     a response is verified as soon as it is finished (the default of stage III);
* ``one step off``  streaming, and the next batch is made while this one trains (``rl.rollout.one_step_off``).

Definition. A verification is *on its way* from the moment its response is finished until its
judgement is there. V is the set of moments at which at least one verification of the step's batch
is on its way, G those at which a response of any batch is being generated, T those at which the
trainer trains. The hidden share is |V and (G or T)| / |V|, summed over the steps but the first
(``rollout/timeline.py``). What is not hidden is time in which the whole run waits for verifications
alone. In ``no overlap`` a verification is on its way when it may start, after the last response.

Being hidden is not being free: with embedded engines verifier, policy and trainer share this
machine's processors, and the two engines one thread. ``--elsewhere 1.0`` puts the verifier
elsewhere: a stand-in that takes this long for each verification and no processor time, as a pool of
servers would look from here. Then the step time shows the gain.
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
from spark_nemo.config.compose import compose_config
from spark_nemo.config.hacking import ConstraintsConfig
from spark_nemo.config.rollout import RolloutConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.records import FormatViolation, Rollout, RolloutVerdict, Verdict, derive_seed
from spark_nemo.records.jsonl import read_problems
from spark_nemo.rewards.hacking.constraints import read_response
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rollout.manager import RolloutManager, open_session
from spark_nemo.rollout.prefetch import RolloutPrefetcher
from spark_nemo.rollout.timeline import TRAIN, VERIFY, seconds
from spark_nemo.toy.resolve import ASSETS, resolve_toy
from spark_nemo.training.advantage_estimator import compute_advantages
from spark_nemo.training.grpo import train_on_rollouts
from spark_nemo.weight_sync.synchronizer import WeightSync

ARMS = ("no overlap", "streaming", "one step off")
TARGET = 0.8


@dataclass
class Elsewhere:
    """A verifier of ``latency`` seconds that needs none of this machine; its verdicts are coins."""

    service: object
    latency: float

    async def judge(self, rollout: Rollout) -> RolloutVerdict:
        """The format gate, then a wait."""
        parsed = read_response(rollout, ConstraintsConfig())
        if isinstance(parsed, FormatViolation):
            return RolloutVerdict(parsed, None)
        await asyncio.sleep(self.latency)
        return RolloutVerdict(
            None, Verdict((True,) * len(parsed.steps), derive_seed(rollout.text) % 2 == 0), 0
        )


@dataclass
class Afterwards:
    """A judge that begins when all responses of the batch are there, and notes when it was at work."""

    judge_: RewardJudge | Elsewhere
    responses: int
    waiting: int = 0
    intervals: list[tuple[float, float]] = field(default_factory=list)
    all_there: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def service(self) -> object:
        """The one of the judge behind it."""
        return self.judge_.service

    async def judge(self, rollout: Rollout) -> RolloutVerdict:
        """Wait for the others, then judge."""
        self.waiting += 1
        if self.waiting == self.responses:
            self.waiting = 0
            self.all_there.set()
            self.all_there = asyncio.Event()
        else:
            await self.all_there.wait()
        start = time.perf_counter()
        try:
            return await self.judge_.judge(rollout)
        finally:
            self.intervals.append((start, time.perf_counter()))


class RLVariant:
    """One way of scheduling, with engines and a trainer of its own; ``step`` makes a step and notes
    its seconds.
    """

    def __init__(self, name: str, config: SparkConfig, folder: Path, latency: float | None) -> None:
        ahead = RolloutConfig(one_step_off=name == "one step off")
        self.config = config = replace(config, rl=replace(config.rl, rollout=ahead))
        self.session: RolloutManager = open_session(config, folder)
        judge = self.session.rollouts.judge
        if latency is not None:
            judge = Elsewhere(judge.service, latency)
        self.afterwards = Afterwards(judge, config.rl.prompts_per_step * config.rl.group_size)
        judge = self.afterwards if name == "no overlap" else judge
        self.session.rollouts = replace(self.session.rollouts, judge=judge)
        self.worker = MegatronWorker.from_hf(
            config.models.policy, config.megatron, 0, config.rl.optimizer, config.rl.steps
        )
        self.sync = WeightSync.build(
            config.weight_sync, self.worker, engine_kind="local", folder=folder
        )
        self.feed = RolloutPrefetcher(config, read_problems(config.data.rl_problems), self.session)
        self.name, self.seconds, self.verified, self.hidden, self.tokens = name, [], 0.0, 0.0, 0

    def step(self, step: int) -> None:
        """What stage III does in a step, without saving and evaluating."""
        start, timeline, rl = time.perf_counter(), self.session.rollouts.timeline, self.config.rl
        run_async(self.sync.push(self.worker, self.session.policy.engine, step))
        batch = self.feed.take(step)
        with timeline.during(TRAIN, step):
            train_on_rollouts(
                self.worker,
                batch.rollouts,
                compute_advantages(batch.rollouts, rl),
                torch.tensor([rollout.valid for rollout in batch.rollouts]),
                rl,
                tokens_per_micro_batch=self.config.megatron.tokens_per_micro_batch,
            )
        self.feed.settle()
        if step > 0:  # the first one has no batch ahead
            self.seconds.append(time.perf_counter() - start)
            self.tokens += sum(len(rollout.response_ids) for rollout in batch.rollouts)
            self._count(timeline.row(step))
        self.afterwards.intervals.clear()
        timeline.forget_before(step)

    def _count(self, row: dict[str, float]) -> None:
        # Where responses wait for the last one, the timeline counts the wait too.
        if self.name == "no overlap":
            self.verified += seconds(self.afterwards.intervals)
            return
        self.verified += row[f"{VERIFY}_seconds"]
        self.hidden += row.get("verify_hidden", 0.0) * row[f"{VERIFY}_seconds"]


def configured(folder: Path, arguments: argparse.Namespace) -> SparkConfig:
    """The small world's stage III without a reference model, which is no part of the question."""
    return resolve_toy(
        compose_config(
            [
                "+experiment=toy",
                f"run.dir={folder}",
                f"rl.reward_model={ASSETS / 'verifier'}",
                "rl.kl_estimator=none",
                "rl.kl_coef=null",
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
) -> Iterator[list[RLVariant]]:
    """Every repeat has fresh arms that make the steps in turns."""
    for repeat in range(arguments.repeats):
        arms = [
            RLVariant(name, config, folder / f"{repeat}-{name}", arguments.elsewhere)
            for name in ARMS
        ]
        for step in range(arguments.steps):
            for arm in arms:
                arm.step(step)
        yield arms
        for arm in arms:
            arm.session.close()


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
    found: dict[str, list[RLVariant]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for arms in repeats(configured(Path(folder), arguments), Path(folder), arguments):
            for arm in arms:
                found[arm.name].append(arm)
    base = statistics.median(s for arm in found[ARMS[0]] for s in arm.seconds)
    print(
        f"{arguments.prompts * 16} responses per step, {arguments.rows} rows per engine, verifier "
        f"{'embedded' if arguments.elsewhere is None else f'elsewhere, {arguments.elsewhere:g} s each'}"
    )
    print(
        f"{'arm':14s} {'hidden':>8s} {'verifying s/step':>17s} {'step s':>8s} {'against no overlap':>19s}"
    )
    for name, arms in found.items():
        step_s = statistics.median(s for arm in arms for s in arm.seconds)
        verified = sum(arm.verified for arm in arms)
        print(
            f"{name:14s} {sum(arm.hidden for arm in arms) / verified:8.1%} "
            f"{verified / sum(len(arm.seconds) for arm in arms):17.2f} {step_s:8.2f} {base / step_s:18.2f}x"
        )
    last = found["one step off"]
    share = sum(arm.hidden for arm in last) / sum(arm.verified for arm in last)
    print(
        f"target: at least {TARGET:.0%} hidden one step off: {'met' if share >= TARGET else 'missed'} ({share:.1%})"
    )


if __name__ == "__main__":
    main()
