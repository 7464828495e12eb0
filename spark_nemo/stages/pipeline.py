"""The three stages in one go: shards of stage I, a reward model per label method, an RL run per reward, the report."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.compose import config_yaml
from spark_nemo.config.rl import VERIFIER_KNOBS
from spark_nemo.records.jsonl import write_text_atomic
from spark_nemo.report.collect import Oracle, collect_summary
from spark_nemo.report.write import write_report
from spark_nemo.stages.checks import check_pipeline
from spark_nemo.stages.jobs import Job, run_jobs
from spark_nemo.stages.run_folder import comparable_rl, stage1_folder, stage2_folder, stage3_folder
from spark_nemo.stages.stage1 import shard_name

log = logging.getLogger(__name__)
_FREE = ("pipeline.", "engine.", "rl.failures.", "rl.save_every", "stage1.max_failure_rate", "stage2.save_every")
"""Settings that may change while a run is unfinished: finished parts do not depend on them."""


def run_pipeline(config: SparkConfig, overrides: Sequence[str], oracle: Oracle | None) -> Path | None:
    """Run what is missing and return the report's path; None when asked to stop (the same call resumes).

    ``overrides`` made ``config``; every job gets them with its own on top. ``oracle`` tells true step labels where a
    world has them, for the report only.
    """
    check_pipeline(config)
    folder = Path(config.run.dir)
    jobs = plan_jobs(config, overrides)
    _same_settings(folder / "config.yaml", config)
    write_text_atomic(folder / "config.yaml", config_yaml(config))
    if not run_jobs(jobs, config.pipeline.parallel_jobs, folder / "logs"):
        log.warning("stopped; run the same command again to go on")
        return None
    command = " ".join(["spark-nemo pipeline", *map(shlex.quote, overrides)])
    return write_report(folder, collect_summary(config, oracle, [command]))


def plan_jobs(config: SparkConfig, overrides: Sequence[str]) -> list[Job]:
    """The jobs in the order they should start; the answer-key baseline waits for nobody."""
    pipeline, run = config.pipeline, config.run
    shards = pipeline.parallel_jobs
    stage1 = [
        Job(f"stage1-{i}", ("stage1", *overrides, f"stage1.num_shards={shards}", f"stage1.shard={i}"),
            stage1_folder(run) / shard_name(replace(config.stage1, num_shards=shards, shard=i)))
        for i in range(shards)
    ]
    collected = frozenset(job.name for job in stage1)
    # The reward model's own method goes first: RL waits for it, and only for it.
    methods = sorted(pipeline.label_methods, key=lambda method: method != config.stage2.method)
    if "process_aware" in pipeline.rewards and config.stage2.method not in methods:
        raise ConfigError(f"stage2.method={config.stage2.method} rewards stage III: add it to pipeline.label_methods")
    stage2 = [Job(f"stage2-{m}", ("stage2", *overrides, f"stage2.method={m}"), stage2_folder(run, m), collected)
              for m in methods]
    stage3 = [_stage3_job(config, overrides, reward) for reward in pipeline.rewards]
    return [*stage1, *stage2[:1], *stage3, *stage2[1:]]


def _same_settings(path: Path, config: SparkConfig) -> None:
    """Raise ``ConfigError`` when the folder's finished parts, which are not made again, had other settings."""
    if not path.exists():
        return
    before = _settings(yaml.safe_load(path.read_text()))
    for name, value in _settings(asdict(config)).items():
        if not name.startswith(_FREE) and (old := before.get(name, value)) != value:
            raise ConfigError(f"{path.parent} was made with {name}={old}, this run has {value}: use another run.dir, "
                              "or the same settings")


def _settings(tree: dict) -> dict[str, object]:
    """Values by dotted name; files in the run folder by their place in it, for the folder has several names."""
    folder, tree = tree["run"]["dir"], {**tree, "rl": comparable_rl(tree["rl"])}
    return {name: value.removeprefix(folder) if isinstance(value, str) else value for name, value in _flat(tree)}


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _stage3_job(config: SparkConfig, overrides: Sequence[str], reward: str) -> Job:
    arguments = ["stage3", *overrides, f"rl.reward={reward}"]
    needs = frozenset({f"stage2-{config.stage2.method}"})
    if reward == "rlvr":
        if config.pipeline.rl_answers is None:
            raise ConfigError("pipeline.rewards has rlvr: set pipeline.rl_answers (JSONL with problem_id and answer)")
        arguments += [f"data.rl_answers={config.pipeline.rl_answers}", "rl.reward_model=null"]
        arguments += [f"rl.{name}={'null' if unset is None else unset}" for name, unset in VERIFIER_KNOBS.items()
                      if getattr(config.rl, name) != unset]
        needs = frozenset()
    return Job(f"stage3-{reward}", tuple(arguments), stage3_folder(config.run, reward), needs)
