"""Stage III: GRPO with the reward model's verdict as the reward.

Declared baselines take the reward from answer keys, votes or a coin instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from spark_nemo.config import SparkConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.base import Engine
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.evaluation.math_data import read_math
from spark_nemo.megatron.checkpoint import has_checkpoint, newest
from spark_nemo.megatron.process_groups import gather_objects, on_main_rank
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.planning.memory_check import check_memory
from spark_nemo.planning.preflight import check_stage3
from spark_nemo.records.fingerprint import check_same_fingerprint
from spark_nemo.records.problems import read_problems
from spark_nemo.rollout.evaluator import Evaluator
from spark_nemo.rollout.manager import RolloutManager
from spark_nemo.rollout.samples import rewrite_rows
from spark_nemo.rollout.timeline import TIMING, TRAIN, Timeline
from spark_nemo.run.completion import (
    fingerprint_before_work,
    record_fingerprint,
    resume_fingerprint,
)
from spark_nemo.run.run_folder import Clock, mark_done, stage3_folder
from spark_nemo.run.run_lock import run_lock
from spark_nemo.training.fine_tuning import CHECKPOINTS
from spark_nemo.training.grpo_trainer import GRPOTrainer
from spark_nemo.training.metrics_writer import MetricsWriter
from spark_nemo.training.stop import StopFlag
from spark_nemo.utils.progress_bar import progress_bar
from spark_nemo.weight_sync.distributed import use_sglang_nccl_settings
from spark_nemo.weight_sync.logprob_gate import FirstStepGate
from spark_nemo.weight_sync.synchronizer import WeightSync

log = logging.getLogger(__name__)
OUT_OF_FORMAT = 0.9
"""Share of a run's first responses above which hardly any group has two different rewards."""


def run_stage3(config: SparkConfig, verifier: ServedModel | None = None) -> bool:
    """Train the policy; evaluate and save on schedule. Collective over the trainer ranks.

    Returns False after a request to stop before the last step; the same call resumes, and the next
    losses equal those of an uninterrupted run. A ``verifier`` that is given (the hacking
    simulator's) takes the place of the reward model's folder. Raises ``ConfigError`` before any
    work on bad input, or when another process runs the same stage.
    """
    check_stage3(config)
    check_memory(config, "stage3")
    folder = stage3_folder(config.run, config.rl_variant)
    inputs = fingerprint_before_work(config, "stage3")
    with run_lock(folder):
        finished = _train(config, folder, verifier)
        if finished and verifier is None:
            record_fingerprint(folder, inputs)
        return finished


def _train(config: SparkConfig, folder: Path, verifier: ServedModel | None) -> bool:
    """Make the remaining steps; False if the run was stopped before the last one."""
    rl = config.rl
    problems = read_problems(config.data.rl_problems)
    eval_problems = read_math(config.data.eval_problems)
    timeline = Timeline()
    worker, sync = _build_worker(config, folder)
    rollouts = RolloutManager(config, problems, folder, timeline, verifier)
    rollouts.on_server_return(sync.restore)
    weight_sync = PolicySync(sync, worker, rollouts.policy_engine)
    with _released(rollouts, weight_sync):
        evaluator = Evaluator(config, rollouts, eval_problems, folder)
        gate = _first_step_gate(config, rollouts, weight_sync)
        trainer = GRPOTrainer(worker, rl, config.megatron.tokens_per_micro_batch, gate)
        served_reward_model = None if verifier is None else verifier.fingerprint
        fingerprint = resume_fingerprint(config, "stage3", served_reward_model)
        checkpointer = Checkpointer(config, folder, fingerprint)
        start = checkpointer.restore(trainer, rollouts)
        logger = StepLogger(config, folder, timeline, start, is_main=worker.is_main)

        with StopFlag(folder) as stop, logger:
            for step in range(start, rl.steps):
                weight_sync.push(step)
                if step % rl.eval_every == 0:
                    evaluator.run(step)
                batch = rollouts.next(step)
                with timeline.during(TRAIN, step):
                    metrics = trainer.update(step, batch.rollouts)
                # One step off-policy, the next batch is generated until here: pushing weights and
                # evaluating need the engines, and the checkpoint holds the batch.
                rollouts.wait()
                logger.log(step, batch.metrics, metrics)
                # Ranks see a signal or the STOP file at different moments: stop if any does.
                stopping = any(gather_objects(stop.requested)) and step + 1 < rl.steps
                if stopping or checkpointer.due(step):
                    checkpointer.save(step, trainer, rollouts)
                if stopping:
                    log.info(
                        "stopped after step %d of %d (%s); run the same command to resume",
                        step + 1,
                        rl.steps,
                        stop.reason,
                    )
                    return False

        rollouts.check_failures()
        weight_sync.push(rl.steps)
        accuracy = evaluator.run(rl.steps)
        worker.save_hf(folder / "model", source_dir=config.models.policy)
        if accuracy is not None:
            checkpointer.clock.save()
            seconds = checkpointer.clock.seconds
            mark_done(folder, {"accuracy": accuracy.sampled.value, "seconds": seconds})
        return True


def _build_worker(config: SparkConfig, folder: Path) -> tuple[MegatronWorker, WeightSync]:
    if config.weight_sync.transport_for(config.engine.kind) == "distributed":
        use_sglang_nccl_settings()
    worker = MegatronWorker.from_hf(
        config.models.policy,
        config.megatron,
        config.run.seed,
        config.rl.optimizer,
        total_steps=config.rl.steps * config.rl.loss.num_minibatches,
    )
    sync = WeightSync.build(
        config.weight_sync,
        worker,
        engine_kind=config.engine.kind,
        folder=folder,
        source_dir=Path(config.models.policy),
        engine_tensor_parallel=config.engine.policy.tensor_parallel or 1,
    )
    return worker, sync


@contextmanager
def _released(rollouts: RolloutManager, weight_sync: PolicySync) -> Iterator[None]:
    """Release engines and process groups however the block ends."""
    try:
        yield
    finally:
        # Servers that live on must keep neither a process group, nor paused requests, nor old
        # weights. A batch that is still being generated would hold the event loop.
        rollouts.cancel()
        try:
            weight_sync.close()
        finally:
            rollouts.close()


@dataclass(frozen=True)
class PolicySync:
    """Weight sync of one trainer with the engine that samples from its policy."""

    sync: WeightSync
    worker: MegatronWorker
    engine: Engine | None
    """None off the main rank."""

    def push(self, version: int) -> None:
        """Give the engine the trainer's weights as ``version``. Collective."""
        run_async(self.sync.push(self.worker, self.engine, version))

    def differing_tensors(self) -> list[str] | None:
        """Name the tensors that the engine serves differently from the trainer's. Collective."""
        return run_async(self.sync.differing_tensors(self.worker, self.engine))

    def close(self) -> None:
        """Leave process groups and remove files; does nothing off the main rank."""
        if self.worker.is_main:
            run_async(self.sync.close())


class Checkpointer:
    """Saves and restores trainer, rollouts and step; remembers the seconds of earlier processes."""

    def __init__(
        self, config: SparkConfig, folder: Path, fingerprint: Mapping[str, object]
    ) -> None:
        self._rl = config.rl
        self._folder = folder / CHECKPOINTS
        self._fingerprint = fingerprint
        self.clock = Clock(folder)

    def due(self, step: int) -> bool:
        """True if the schedule saves after ``step``; it always saves after the last one."""
        return (step + 1) % self._rl.save_every == 0 or step + 1 == self._rl.steps

    def save(self, step: int, trainer: GRPOTrainer, rollouts: RolloutManager) -> None:
        """Write a checkpoint from which a run resumes at ``step + 1``. Collective."""
        state = {"step": step + 1, "fingerprint": self._fingerprint}
        trainer.worker.save_checkpoint(self._folder, state, files=rollouts.files())
        on_main_rank(self.clock.save)

    def restore(self, trainer: GRPOTrainer, rollouts: RolloutManager) -> int:
        """Load the newest checkpoint, if any, and return the first step to make. Collective.

        Raises ``ConfigError`` when a run with other settings saved it.
        """
        if not has_checkpoint(self._folder):
            return 0
        state = trainer.worker.load_checkpoint(self._folder)
        check_same_fingerprint(state["fingerprint"], self._fingerprint, self._folder)
        rollouts.restore(newest(self._folder))
        return int(state["step"])


class StepLogger:
    """Writes the rows of finished steps and shows progress; does nothing off the main rank."""

    def __init__(
        self, config: SparkConfig, folder: Path, timeline: Timeline, start: int, *, is_main: bool
    ) -> None:
        self._folder = folder
        self._timeline = timeline
        self._start = start
        self._is_main = is_main
        self._writer = MetricsWriter(folder, is_main=is_main)
        self._writer.truncate_from(start)
        self._bar = progress_bar(
            total=config.rl.steps,
            initial=start,
            desc=f"rl {config.rl_variant}",
            unit="step",
            disable=not is_main,
        )

    def log(
        self, step: int, batch_metrics: Mapping[str, float], train_metrics: Mapping[str, float]
    ) -> None:
        """Write one row of metrics.jsonl and one of timing.jsonl."""
        if not self._is_main:
            return
        if step == self._start:
            warn_out_of_format(batch_metrics)
        self._writer.write(step, {**batch_metrics, **train_metrics})
        timing = {"step": step, **self._timeline.row(step)}
        rewrite_rows(self._folder / TIMING, step, [timing])
        self._timeline.forget_before(step)
        self._bar.set_postfix(reward=f"{batch_metrics['reward']:.3f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> StepLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._writer.close()


def warn_out_of_format(metrics: Mapping[str, float]) -> None:
    """Warn at once that a policy without the format learns nothing, not after a night."""
    share = metrics.get("format_violations", 0.0)
    if share > OUT_OF_FORMAT:
        log.warning(
            "%.0f %% of the responses break the format and get no reward, and groups of equal "
            "rewards teach nothing: teach the format first (`spark-nemo sft`); violation/* in "
            "metrics.jsonl names the rules",
            100 * share,
        )


def _first_step_gate(
    config: SparkConfig, rollouts: RolloutManager, weight_sync: PolicySync
) -> FirstStepGate:
    def differing_tensors() -> list[str] | None:
        # The run ends here, and checksums need the engines to themselves.
        rollouts.cancel()
        return weight_sync.differing_tensors()

    return FirstStepGate(config.weight_sync, differing_tensors, rollouts.decode_token)
