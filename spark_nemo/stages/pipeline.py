"""The three stages in one go: shards of stage I, a reward model per label method, an RL run per
reward, the report.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.compose import config_yaml
from spark_nemo.planning.memory_check import check_memory
from spark_nemo.planning.preflight import check_pipeline
from spark_nemo.report.collect_summary import Oracle, collect_summary
from spark_nemo.report.page import write_report
from spark_nemo.run.job_graph import build_job_graph
from spark_nemo.run.local_executor import run_job_graph
from spark_nemo.run.run_folder import comparable_rl
from spark_nemo.run.run_lock import run_lock
from spark_nemo.utils.files import write_text_atomic

log = logging.getLogger(__name__)
_FREE = (
    "pipeline.",
    "engine.",
    "sft.",
    "data.sft_examples",
    "models.policy_base",
    "rl.failures.",
    "rl.save_every",
    "stage1.max_failure_rate",
    "stage2.save_every",
)
"""Settings that may change while a run is unfinished: finished parts do not depend on them."""
_FIXED = ("pipeline.rounds",)  # decides which reward model stage III had


def run_pipeline(
    config: SparkConfig, overrides: Sequence[str], oracle: Oracle | None
) -> Path | None:
    """Run what is missing and return the report's path; None when asked to stop (the same call
    resumes).

    ``overrides`` made ``config``; every job gets them with its own on top. ``oracle`` tells true
    step labels where a world has them, for the report only. Raises ``ConfigError`` also when
    another pipeline is at the same folder.
    """
    check_pipeline(config)
    trained = [("stage2", config.pipeline.label_methods), ("stage3", config.pipeline.rewards)]
    check_memory(config, *(stage for stage, parts in trained if parts))
    folder = Path(config.run.dir)
    jobs = build_job_graph(config, overrides)
    with run_lock(folder):
        claim_run_folder(config)
        if not run_job_graph(jobs, config.pipeline.parallel_jobs, folder / "logs"):
            log.warning("stopped; run the same command again to go on")
            return None
        command = " ".join(["spark-nemo pipeline", *map(shlex.quote, overrides)])
        return write_report(folder, collect_summary(config, oracle, [command]))


def claim_run_folder(config: SparkConfig) -> None:
    """Write ``config.yaml``. Raises ``ConfigError`` when the folder's finished parts were made with
    other settings.
    """
    path = Path(config.run.dir) / "config.yaml"
    _same_settings(path, config)
    write_text_atomic(path, config_yaml(config))


def _same_settings(path: Path, config: SparkConfig) -> None:
    """Raise ``ConfigError`` when the folder's finished parts, which are not made again, had other
    settings.
    """
    if not path.exists():
        return
    before = _settings(yaml.safe_load(path.read_text()))
    for name, value in _settings(asdict(config)).items():
        free = name.startswith(_FREE) and name not in _FIXED
        if not free and (old := before.get(name, value)) != value:
            raise ConfigError(
                f"{path.parent} was made with {name}={old}, this run has {value}: use another run.dir, "
                "or the same settings"
            )


def _settings(tree: dict) -> dict[str, object]:
    """Values by dotted name; files in the run folder by their place in it, for the folder has
    several names.
    """
    folder, tree = tree["run"]["dir"], {**tree, "rl": comparable_rl(tree["rl"])}
    return {
        name: value.removeprefix(folder) if isinstance(value, str) else value
        for name, value in _flat(tree)
    }


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
