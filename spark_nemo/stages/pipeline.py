"""The whole pipeline: stage I in shards, a reward model per label method, RL variants, the report."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from spark_nemo.config import SparkConfig
from spark_nemo.planning.memory_check import check_memory
from spark_nemo.planning.preflight import check_pipeline
from spark_nemo.records.fingerprint import check_same_fingerprint, flatten_settings
from spark_nemo.report.collect_summary import Oracle, collect_summary
from spark_nemo.report.page import write_report
from spark_nemo.run.compose import config_yaml
from spark_nemo.run.job_graph import build_job_graph
from spark_nemo.run.local_executor import parallel_jobs, run_job_graph
from spark_nemo.run.run_lock import run_lock
from spark_nemo.run.stage_spec import is_same_in_pipeline
from spark_nemo.utils.files import write_text_atomic

log = logging.getLogger(__name__)


def run_pipeline(
    config: SparkConfig, overrides: Sequence[str], oracle: Oracle | None
) -> Path | None:
    """Run what is missing and return the report's path, or None if a signal stopped the run.

    The same call resumes. ``overrides`` made ``config``; every job gets them with its own on top.
    ``oracle`` gives true step labels where a task has them, for the report only. Raises
    ``ConfigError`` for invalid settings, and if another pipeline runs in the same folder.
    """
    check_pipeline(config)
    trained = [("stage2", config.pipeline.label_methods), ("stage3", config.pipeline.rewards)]
    check_memory(config, *(stage for stage, parts in trained if parts))
    folder = Path(config.run.dir)
    jobs = build_job_graph(config, overrides)
    with run_lock(folder):
        claim_run_folder(config)
        if not run_job_graph(jobs, parallel_jobs(config), folder / "logs"):
            log.warning("stopped; the same command resumes")
            return None
        command = " ".join(["spark-nemo pipeline", *map(shlex.quote, overrides)])
        return write_report(folder, collect_summary(config, oracle, [command]))


def claim_run_folder(config: SparkConfig) -> None:
    """Write ``config.yaml`` to the run folder.

    Raises ``ConfigError`` if finished stage runs in the folder were made with other settings: the
    pipeline does not run them again.
    """
    path = Path(config.run.dir) / "config.yaml"
    if path.exists():
        stored = _comparable_settings(yaml.safe_load(path.read_text()))
        check_same_fingerprint(stored, _comparable_settings(asdict(config)), path.parent)
    write_text_atomic(path, config_yaml(config))


def _comparable_settings(tree: dict) -> dict[str, object]:
    """Return the settings that must not change, by dotted name.

    Files in the run folder count by their place in it: the folder may have been moved.
    """
    folder = tree["run"]["dir"]
    settings = {}
    for name, value in flatten_settings(tree):
        if is_same_in_pipeline(name):
            settings[name] = value.removeprefix(folder) if isinstance(value, str) else value
    return settings
