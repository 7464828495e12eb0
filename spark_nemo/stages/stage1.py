"""Stage I: verification data.

In: problems, a generator, a verifier. The generator writes M solutions per problem, the verifier
judges each N times. Out: a store of solutions and verifications, which stage II labels; nothing in
it is sampled twice.
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
from spark_nemo.records.jsonl import read_problems
from spark_nemo.records.store import RecordStore
from spark_nemo.run.completion import fingerprint_before_work, record_fingerprint
from spark_nemo.run.run_folder import Clock, mark_done, progress, shard_name, stage1_folder
from spark_nemo.run.run_lock import run_lock
from spark_nemo.utils.files import write_json_atomic
from spark_nemo.verification.sampler import CollectCounts, Collector
from spark_nemo.verification.stage1_critique import AfterVotes, after_votes
from spark_nemo.verification.stage1_monitor import (
    Stage1Monitor,
    TokenAccountingFile,
    check_failure_rates,
)

log = logging.getLogger(__name__)
_LAST_PROBE_S = 30.0


def run_stage1(config: SparkConfig) -> CollectCounts:
    """Sample what is missing of the configured shard (or of everything) and write its statistics.

    Raises ``ConfigError`` on bad input, or when another process is at this shard, before any model
    is loaded; ``TooManyFailures`` when more than ``stage1.max_failure_rate`` of the solutions or
    verifications is unusable: as soon as that is clear, and what is stored by then stays.
    """
    check_stage1(config)
    folder = stage1_folder(config.run)
    name = shard_name(config.stage1)
    fingerprint = fingerprint_before_work(config, "stage1")
    with run_lock(folder / name):
        counts = _sample(config, folder, name)
        # Otherwise the shard is incomplete and the same command has work to do.
        if not counts.postponed_verifications and not counts.engine_failures:
            record_fingerprint(folder / name, fingerprint)
        return counts


def _sample(config: SparkConfig, folder: Path, name: str) -> CollectCounts:
    stage = config.stage1
    problems = _shard(read_problems(config.data.stage1_problems), config)
    total = len(problems) * stage.solutions_per_problem * stage.verifications_per_solution
    log_dir = folder / "servers" / name
    generator = ServedModel.load(config.engine, config.models.generator, "policy", log_dir)
    verifier = ServedModel.load(config.engine, config.models.verifier, "verifier", log_dir)
    clock = Clock(folder / name)

    with (
        RecordStore(folder / "store", writer_name=name, fsync_every=256) as store,
        progress(folder / name, total, "verification", clock) as bar,
    ):
        monitor = Stage1Monitor(stage, total, bar.update)
        reused = stage.reuse_solutions_from
        earlier = RecordStore(reused) if reused is not None else None
        after = after_votes(config, verifier, store, log_dir)
        collector = Collector(
            stage, config.run.seed, generator, verifier, store, monitor, after, earlier
        )
        _claim_store(
            folder / "made_by.json", {**collector.made_by(), **(after.made_by() if after else {})}
        )
        freeze_heap()
        accounting = TokenAccountingFile(folder / f"ledger-{name}.json", collector.ledger)
        monitor.accounting_file = accounting
        try:
            counts = asyncio.run(_collect(collector, after, problems, config))
        finally:
            accounting.save()
            monitor.show(collector.counts)
    if counts.postponed_verifications:
        log.warning(
            "%d verifications were skipped because an engine failed; "
            "rerun the same command to collect them",
            counts.postponed_verifications,
        )
    clock.save()
    extra = after.stats() if after else {}
    for what, row in extra.items():
        log.info("%s: %s", what, row)
    write_json_atomic(
        folder / f"stats-{name}.json", {**asdict(counts), **extra, "seconds": clock.seconds}
    )
    check_failure_rates(counts, stage.max_failure_rate, more=after.rates() if after else [])
    mark_done(folder / name, asdict(counts))
    return counts


async def _collect(
    collector: Collector,
    after: AfterVotes | None,
    problems: list[Problem],
    config: SparkConfig,
) -> CollectCounts:
    # Twice what is decoded together, so that a row that falls free finds a request waiting.
    in_flight = config.stage1.max_requests_in_flight or 2 * config.engine.slots("verifier")
    engines = [collector.generator, collector.verifier]
    if after is not None and after.critic is not collector.verifier:
        engines.append(after.critic)
    try:
        counts = await collector.run(problems, in_flight)
        for served in engines:
            await served.engine.probe(_LAST_PROBE_S)
        return counts
    except EngineFailure as failure:
        raise _stopped(failure) from failure
    except ExceptionGroup as group:
        first = _first(group)  # a full disk is one error, not a tree of them
        raise (_stopped(first) if isinstance(first, EngineFailure) else first) from group
    finally:
        for served in engines:
            await served.engine.close()


def _stopped(failure: EngineFailure) -> EngineFailure:
    return EngineFailure(
        f"stage I stopped before its end, what is stored stays, run again: {failure}"
    )


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


def _first(error: Exception) -> Exception:
    return _first(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error


def _shard(problems: list[Problem], config: SparkConfig) -> list[Problem]:
    stage = config.stage1
    return problems if stage.shard is None else problems[stage.shard :: stage.num_shards]
