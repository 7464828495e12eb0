"""Stage I: verification data.

In: problems, a generator and a verifier. The generator writes M solutions per problem, and the
verifier judges each of them N times. Out: a store of solutions and verifications, which stage II
labels. Nothing that is in the store is sampled again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.engines.async_utils import freeze_heap
from spark_nemo.engines.base import EngineFailure
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.planning.preflight import check_stage1
from spark_nemo.records import Problem
from spark_nemo.records.fingerprint import check_same_fingerprint
from spark_nemo.records.problems import read_problems
from spark_nemo.records.store import RecordStore
from spark_nemo.run.completion import fingerprint_before_work, record_fingerprint
from spark_nemo.run.run_folder import Clock, mark_done, progress, shard_name, stage1_folder
from spark_nemo.run.run_lock import run_lock
from spark_nemo.utils.files import write_json_atomic
from spark_nemo.verification.sampler import SamplingCounts, Stage1Sampler
from spark_nemo.verification.stage1_critique import Stage1Critic, build_stage1_critic
from spark_nemo.verification.stage1_monitor import (
    Stage1Monitor,
    TokenAccountingFile,
    check_failure_rates,
)

log = logging.getLogger(__name__)
_LAST_PROBE_S = 30.0


def run_stage1(config: SparkConfig) -> SamplingCounts:
    """Sample what is missing of the configured shard (or of everything) and write its statistics.

    Raises ``ConfigError`` before any model is loaded, on bad input or while another process runs
    this shard. Raises ``TooManyFailures`` as soon as the share of unusable texts is clearly above
    ``stage1.max_failure_rate``; stored results stay.
    """
    check_stage1(config)
    folder = stage1_folder(config.run)
    shard = shard_name(config.stage1)
    fingerprint = fingerprint_before_work(config, "stage1")
    with run_lock(folder / shard):
        counts = _sample(config, folder, shard)
        # Otherwise the shard is incomplete, and the same command has work left to do.
        if not counts.postponed_verifications and not counts.engine_failures:
            record_fingerprint(folder / shard, fingerprint)
        return counts


def _sample(config: SparkConfig, folder: Path, shard: str) -> SamplingCounts:
    stage = config.stage1
    problems = _problems_of_shard(config)
    num_verifications = (
        len(problems) * stage.solutions_per_problem * stage.verifications_per_solution
    )
    log_dir = folder / "servers" / shard
    generator = ServedModel.load(config.engine, config.models.generator, "policy", log_dir)
    verifier = ServedModel.load(config.engine, config.models.verifier, "verifier", log_dir)
    clock = Clock(folder / shard)
    with (
        RecordStore(folder / "store", writer_name=shard, fsync_every=256) as store,
        progress(folder / shard, num_verifications, "verification", clock) as bar,
    ):
        critic = build_stage1_critic(config, verifier, store, log_dir)
        monitor = Stage1Monitor(stage, num_verifications, bar.update)
        earlier = None
        if stage.reuse_solutions_from is not None:
            earlier = RecordStore(stage.reuse_solutions_from)
        sampler = Stage1Sampler(
            stage,
            config.run.seed,
            generator,
            verifier,
            store,
            on_result=monitor,
            on_votes_complete=critic.sample if critic is not None else None,
            earlier=earlier,
        )
        fingerprint = sampler.fingerprint()
        if critic is not None:
            fingerprint |= critic.fingerprint()
        _claim_store(folder / "fingerprint.json", fingerprint)
        accounting = TokenAccountingFile(
            folder / f"token_accounting-{shard}.json", sampler.accounting
        )
        monitor.accounting_file = accounting
        # Twice the decoding batch, so that a row that becomes free finds a request waiting.
        max_in_flight = stage.max_requests_in_flight or 2 * config.engine.slots("verifier")
        freeze_heap()
        try:
            asyncio.run(_run_and_close(sampler, critic, problems, max_in_flight))
        finally:
            accounting.save()
            monitor.show(sampler.counts)
    clock.save()
    return _finish(config, folder, shard, clock, sampler.counts, critic)


def _finish(
    config: SparkConfig,
    folder: Path,
    shard: str,
    clock: Clock,
    counts: SamplingCounts,
    critic: Stage1Critic | None,
) -> SamplingCounts:
    """Write statistics, check the failure rates of the whole run, and mark the shard as done."""
    if counts.postponed_verifications:
        log.warning(
            "%d verifications were skipped because an engine failed; "
            "rerun the same command to collect them",
            counts.postponed_verifications,
        )
    critic_statistics = critic.statistics() if critic is not None else {}
    for name, row in critic_statistics.items():
        log.info("%s: %s", name, row)
    statistics = {**asdict(counts), **critic_statistics, "seconds": clock.seconds}
    write_json_atomic(folder / f"stats-{shard}.json", statistics)
    critic_failures = critic.failure_counts() if critic is not None else []
    check_failure_rates(counts, config.stage1.max_failure_rate, more=critic_failures)
    mark_done(folder / shard, asdict(counts))
    return counts


def _problems_of_shard(config: SparkConfig) -> list[Problem]:
    problems = read_problems(config.data.stage1_problems)
    stage = config.stage1
    return problems if stage.shard is None else problems[stage.shard :: stage.num_shards]


def _claim_store(path: Path, fingerprint: dict[str, object]) -> None:
    """Raise ``ConfigError`` unless the store's earlier records have the same fingerprint.

    Later stages read everything in the store, so it holds the results of one configuration.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    # Critiques and reference verifications may be added to a store that has none: their settings
    # are compared once both have them.
    shared = [name for name in fingerprint if name in stored]
    check_same_fingerprint(
        {name: stored[name] for name in shared},
        {name: fingerprint[name] for name in shared},
        path.parent,
    )
    write_json_atomic(path, {**stored, **fingerprint})


async def _run_and_close(
    sampler: Stage1Sampler,
    critic: Stage1Critic | None,
    problems: list[Problem],
    max_in_flight: int,
) -> None:
    """Sample, check that every engine still answers, and close the engines."""
    engines = [sampler.generator.engine, sampler.verifier.engine]
    if critic is not None and critic.critic is not sampler.verifier:
        engines.append(critic.critic.engine)
    try:
        await sampler.run(problems, max_in_flight)
        for engine in engines:
            await engine.probe(_LAST_PROBE_S)
    except EngineFailure as failure:
        raise _stopped_early(failure) from failure
    except ExceptionGroup as group:
        # Many requests fail of one cause, such as a full disk: report it once.
        cause = _first_exception(group)
        if isinstance(cause, EngineFailure):
            raise _stopped_early(cause) from group
        raise cause from group
    finally:
        for engine in engines:
            await engine.close()


def _stopped_early(failure: EngineFailure) -> EngineFailure:
    return EngineFailure(
        f"stage I stopped early: {failure}; results are stored, rerun the same command to resume"
    )


def _first_exception(error: Exception) -> Exception:
    if isinstance(error, ExceptionGroup):
        return _first_exception(error.exceptions[0])
    return error
