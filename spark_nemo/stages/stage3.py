"""Stage III: GRPO with the reward model's verdict (or, as declared baselines, with answer keys,
votes or a coin).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from spark_nemo.config import SparkConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.fleet import Fleet
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.evaluation.math_data import read_math
from spark_nemo.megatron.checkpoint import has_checkpoint, newest
from spark_nemo.megatron.process_groups import gather_objects, on_main_rank
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.planning.memory_check import check_memory
from spark_nemo.planning.preflight import check_stage3, reward_model_folder
from spark_nemo.records import Problem, content_key
from spark_nemo.records.fingerprint import check_same_fingerprint, model_fingerprint
from spark_nemo.records.jsonl import read_problems
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.manager import RolloutManager, open_session, rewrite_rows
from spark_nemo.rollout.prefetch import RolloutPrefetcher
from spark_nemo.rollout.timeline import TIMING, TRAIN, Timeline
from spark_nemo.run.completion import inputs_to_remember, remember_inputs
from spark_nemo.run.run_folder import Clock, comparable_rl, mark_done, stage3_folder
from spark_nemo.run.run_lock import run_lock
from spark_nemo.training.advantage_estimator import compute_advantages
from spark_nemo.training.fine_tuning import CHECKPOINTS
from spark_nemo.training.grpo import train_on_rollouts
from spark_nemo.training.metrics_writer import MetricsWriter
from spark_nemo.training.stop import StopFlag
from spark_nemo.utils.progress_bar import progress_bar
from spark_nemo.weight_sync.distributed import same_nccl_as_sglang
from spark_nemo.weight_sync.logprob_gate import FirstStepGate
from spark_nemo.weight_sync.synchronizer import WeightSync

log = logging.getLogger(__name__)
_OUT_OF_FORMAT = 0.9
"""Share of a run's first responses above which nearly no group can have two different rewards."""


def run_stage3(config: SparkConfig, verifier: ServedModel | None = None) -> bool:
    """Generate, verify, train, sync; evaluate and save now and then. Collective over the trainer
    ranks.

    Returns False when asked to stop before the last step; the same call resumes, and the next
    losses are those of an uninterrupted run. A ``verifier`` that is served already (the hacking
    simulator's) is asked instead of the reward model's folder. Raises ``ConfigError`` on bad input,
    or when another process is at it, before any work.
    """
    check_stage3(config)
    check_memory(config, "stage3")
    folder, inputs = (
        stage3_folder(config.run, config.rl_variant),
        inputs_to_remember(config, "stage3"),
    )
    with run_lock(folder):
        finished = _train(config, folder, verifier)
        if finished and verifier is None:
            remember_inputs(folder, inputs)
        return finished


def _train(config: SparkConfig, folder: Path, verifier: ServedModel | None) -> bool:
    rl = config.rl
    problems, eval_problems = (
        read_problems(config.data.rl_problems),
        read_math(config.data.eval_problems),
    )
    if config.weight_sync.transport_for(config.engine.kind) == "distributed":
        same_nccl_as_sglang()
    worker = MegatronWorker.from_hf(
        config.models.policy,
        config.megatron,
        config.run.seed,
        rl.optimizer,
        rl.steps * rl.num_minibatches,
    )
    sync = WeightSync.build(
        config.weight_sync,
        worker,
        engine_kind=config.engine.kind,
        folder=folder,
        source_dir=Path(config.models.policy),
        engine_tensor_parallel=config.engine.policy.tensor_parallel or 1,
    )
    session = _open_on_main_rank(config, folder, sync, verifier)
    try:
        return _run(
            config,
            worker,
            sync,
            session,
            RolloutPrefetcher(config, problems, session),
            eval_problems,
            made_with(config, problems, verifier),
        )
    finally:
        _release(sync, session)


def _run(
    config: SparkConfig,
    worker: MegatronWorker,
    sync: WeightSync,
    session: RolloutManager | None,
    feed: RolloutPrefetcher,
    eval_problems: list,
    made: dict[str, object],
) -> bool:
    """The steps that are missing. Was the last one made?"""
    rl, folder = config.rl, stage3_folder(config.run, config.rl_variant)
    reference = worker.snapshot() if rl.kl_estimator != "none" else None
    start = _resume(worker, made, folder / CHECKPOINTS, feed, session)
    writer, clock = MetricsWriter(folder, is_main=worker.is_main), Clock(folder)
    writer.truncate_from(start)
    timeline = session.rollouts.timeline if session is not None else Timeline()

    bar = progress_bar(
        total=rl.steps,
        initial=start,
        desc=f"rl {config.rl_variant}",
        unit="step",
        disable=not worker.is_main,
    )
    with StopFlag(folder) as stop, feed, bar, closing(writer):
        for step in range(start, rl.steps):
            _sync(sync, worker, session, step)
            if step % rl.eval_every == 0:
                on_main_rank(lambda step=step: run_async(session.evaluate(eval_problems, step)))
            batch = feed.take(step)
            with timeline.during(TRAIN, step):
                metrics = train_on_rollouts(
                    worker,
                    batch.rollouts,
                    compute_advantages(batch.rollouts, rl),
                    torch.tensor([rollout.valid for rollout in batch.rollouts]),
                    rl,
                    reference=reference,
                    tokens_per_micro_batch=config.megatron.tokens_per_micro_batch,
                    gate=_gate(config, sync, worker, session, feed)
                    if _compares(start, step, feed, batch)
                    else None,
                )
            if step == start and worker.is_main:
                warn_out_of_format(batch.metrics)
            feed.settle()
            watched = on_main_rank(
                lambda step=step, batch=batch: run_async(session.watched(batch, step))
            )
            writer.write(step, {**batch.metrics, **feed.metrics(batch, step), **watched, **metrics})
            _write_timing(folder, timeline, step, worker.is_main)
            bar.set_postfix(reward=f"{batch.metrics['reward']:.3f}", refresh=False)
            bar.update()
            stopping = any(gather_objects(stop.requested)) and step + 1 < rl.steps
            if stopping or (step + 1) % rl.save_every == 0 or step + 1 == rl.steps:
                worker.save_checkpoint(
                    folder / CHECKPOINTS,
                    {"step": step + 1, "fingerprint": made, **feed.state()},
                    files={**feed.files(), **(session.files() if session is not None else {})},
                )
                on_main_rank(clock.save)
            if stopping:
                log.info(
                    "stopped after step %d of %d (%s); run again to go on",
                    step + 1,
                    rl.steps,
                    stop.reason,
                )
                return False
    _finish(sync, worker, session, config, folder, clock, eval_problems)
    return True


def _open_on_main_rank(
    config: SparkConfig,
    folder: Path,
    sync: WeightSync,
    verifier: ServedModel | None,
) -> RolloutManager | None:
    """The session on the main rank, None on the others. An error is every rank's, or they would
    wait for it.

    A server of a fleet that returns in the middle of a step gets the current weights from ``sync``
    before it serves.
    """
    opened: list[RolloutManager] = []
    on_main_rank(lambda: opened.append(open_session(config, folder, verifier)))
    if opened and isinstance(opened[0].policy.engine, Fleet):
        opened[0].policy.engine.on_return = sync.restore
    return opened[0] if opened else None


def _release(sync: WeightSync, session: RolloutManager | None) -> None:
    """However the run ends: servers that live on keep neither a process group, nor paused requests,
    nor old weights.
    """
    if session is None:
        return
    try:
        run_async(sync.close())
    finally:
        session.close()


def made_with(
    config: SparkConfig,
    problems: Sequence[Problem],
    verifier: ServedModel | None = None,
) -> dict[str, object]:
    """What the steps depend on, by name: settings, and of the problems and the models their
    content.
    """
    free = {
        "eval_every",
        "save_every",
        "failures",
        "verifier_queue",
        "verifier_deadline",
        "verifier_cache",
    }
    rl = comparable_rl(asdict(config.rl))
    rl |= {
        "sampling": config.rl.sampling.fingerprint(),
        "verifier_sampling": config.rl.verifier_sampling.fingerprint(),
    }
    judge = {}
    if config.rl.asks_reward_model:
        judge["the reward model"] = (
            verifier.fingerprint if verifier else model_fingerprint(reward_model_folder(config))
        )
    return {
        **{f"rl.{name}": value for name, value in rl.items() if name not in free},
        **judge,
        "run.seed": config.run.seed,
        "models.policy": model_fingerprint(config.models.policy),
        "data.rl_problems": content_key(
            [(problem.problem_id, problem.question) for problem in problems]
        ),
    }


def _resume(
    worker: MegatronWorker,
    made: dict[str, object],
    checkpoints: Path,
    feed: RolloutPrefetcher,
    session: RolloutManager | None,
) -> int:
    """The step to go on from. Raises ``ConfigError`` when the checkpoint is of a run with other
    settings.
    """
    if not has_checkpoint(checkpoints):
        return 0
    state = worker.load_checkpoint(checkpoints)
    check_same_fingerprint(state["fingerprint"], made, checkpoints)
    feed.restore(state, newest(checkpoints))
    on_main_rank(lambda: session.restore(newest(checkpoints)))
    return int(state["step"])


def _finish(
    sync: WeightSync,
    worker: MegatronWorker,
    session: RolloutManager | None,
    config: SparkConfig,
    folder: Path,
    clock: Clock,
    eval_problems: list,
) -> None:
    on_main_rank(lambda: session.rollouts.failures.finish(config.rl.failures.bound))
    _sync(sync, worker, session, config.rl.steps)
    accuracy = on_main_rank(lambda: run_async(session.evaluate(eval_problems, config.rl.steps)))
    worker.save_hf(folder / "model", source_dir=config.models.policy)
    if session is not None:
        clock.save()
        mark_done(folder, {"accuracy": accuracy.sampled.value, "seconds": clock.seconds})


def _sync(
    sync: WeightSync, worker: MegatronWorker, session: RolloutManager | None, version: int
) -> None:
    run_async(sync.push(worker, session.policy.engine if session else None, version))


def _compares(start: int, step: int, feed: RolloutPrefetcher, batch: RolloutBatch) -> bool:
    """Does the first-step gate look at this batch? Not at one that older weights sampled: it would
    differ.
    """
    if step == start and not feed.is_current(batch, step):
        log.info(
            "first-step gate: the batch of step %d was sampled with older weights and is not compared",
            step,
        )
    return step == start and feed.is_current(batch, step)


def _gate(
    config: SparkConfig,
    sync: WeightSync,
    worker: MegatronWorker,
    session: RolloutManager | None,
    feed: RolloutPrefetcher,
) -> FirstStepGate:
    engine = session.policy.engine if session else None
    show = session.policy.tokenizer.decode_response if session else None

    def differing_tensors() -> list[str] | None:
        feed.abandon()  # the run ends here, and the engine can only be asked when nobody else talks to it
        return run_async(sync.differing_tensors(worker, engine))

    return FirstStepGate(
        config.weight_sync,
        differing_tensors,
        **({"show": lambda token: show((token,))} if show else {}),
    )


def warn_out_of_format(metrics: Mapping[str, float]) -> None:
    """Say once, early, that a policy without the format learns nothing, in place of a flat curve
    after a night.
    """
    share = metrics.get("format_violations", 0.0)
    if share > _OUT_OF_FORMAT:
        log.warning(
            "%.0f %% of the responses break the format and are paid nothing, and groups of equal rewards teach "
            "nothing: teach the format first (`spark-nemo sft`); violation/* in metrics.jsonl says which rules",
            100 * share,
        )


def _write_timing(folder: Path, timeline: Timeline, step: int, is_main: bool) -> None:
    if is_main:
        rewrite_rows(folder / TIMING, step, [{"step": step, **timeline.row(step)}])
        timeline.forget_before(step)
