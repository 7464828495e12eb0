"""Inputs, outputs and resume rules of each stage: one table for every check.

Preflight, ``--dry-run``, the Slurm manifest, the completion check, the resume checks and
``spark-nemo status`` read it. Names are dotted setting paths; the name of a section means every
setting in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.run.run_folder import (
    sft_folder,
    shard_name,
    stage1_folder,
    stage2_folder,
    stage3_folder,
)


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage's inputs, outputs and resume rules."""

    name: str
    models: tuple[str, ...]
    """Model folders that must be set."""
    data: tuple[str, ...]
    """Data files that must be set."""
    settings: tuple[str, ...]
    """Everything else that the stage's results depend on, ``run.seed`` apart."""
    folder: Callable[[SparkConfig], Path]
    """Folder of the configured stage run: its DONE marker, lock and progress."""
    result: str
    """Path below ``folder`` that exists while the results do."""
    optional_models: tuple[str, ...] = ()
    answer_keys: tuple[str, ...] = ()
    """Data files with answer keys, for declared baselines; unset otherwise."""
    trained_model: str | None = None
    """Setting of the model that the trainer ranks hold."""
    same_on_resume: tuple[str, ...] = ()
    """Settings that an unfinished run of stage III must not change.

    The other stages compare fingerprints of their own: stage I its store's, fine-tuning the
    fingerprint of the tokens it trains on.
    """
    free_on_resume: tuple[str, ...] = ()
    """Exceptions below ``same_on_resume``; of two names that match, the longer one decides."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Everything that the stage's results depend on."""
        files = (*self.models, *self.optional_models, *self.data, *self.answer_keys)
        return ("run.seed", *self.settings, *files)

    def is_same_on_resume(self, setting: str) -> bool:
        """Return whether an unfinished run must keep the value of ``setting``."""
        same = _longest_match(self.same_on_resume, setting)
        return same > 0 and same > _longest_match(self.free_on_resume, setting)


def _stage1_run_folder(config: SparkConfig) -> Path:
    return stage1_folder(config.run) / shard_name(config.stage1)


def _stage2_run_folder(config: SparkConfig) -> Path:
    return stage2_folder(config.run, config.stage2.method, config.stage2.variant)


def _stage3_run_folder(config: SparkConfig) -> Path:
    return stage3_folder(config.run, config.rl_variant)


SFT = StageSpec(
    name="sft",
    models=("models.policy_base",),
    data=("data.sft_examples",),
    settings=("sft", "rl.prompt_set"),
    folder=lambda config: sft_folder(config.run),
    result="model/config.json",
    trained_model="models.policy_base",
)
STAGE1 = StageSpec(
    name="stage1",
    models=("models.generator", "models.verifier"),
    optional_models=("models.critic",),
    data=("data.stage1_problems",),
    answer_keys=("stage1.reference_answers",),
    settings=("stage1",),
    folder=_stage1_run_folder,
    result="../store",
)
STAGE2 = StageSpec(
    name="stage2",
    models=("models.reward_base",),
    data=("data.processbench",),
    answer_keys=("labels.reference_answers",),
    settings=("stage2", "labels", "stage1.prompt_set"),
    folder=_stage2_run_folder,
    result="model/config.json",
    trained_model="models.reward_base",
)
STAGE3 = StageSpec(
    name="stage3",
    models=("models.policy",),
    data=("data.rl_problems", "data.eval_problems"),
    answer_keys=("data.rl_answers",),
    settings=("rl", "evaluation", "stage1.prompt_set", "reward_variant"),
    folder=_stage3_run_folder,
    result="model/config.json",
    trained_model="models.policy",
    same_on_resume=(
        "run.seed",
        "rl",
        "reward_variant",
        "models.policy",
        "data.rl_problems",
    ),
    free_on_resume=(
        "rl.eval_every",
        "rl.save_every",
        "rl.reward.failures",
        "rl.reward.retries",
        "rl.reward.queue",
        "rl.reward.deadline_s",
        "rl.reward.cache",
        # Detectors, probes and the held-out verifier monitor a run and change nothing in it.
        "rl.reward.probes",
        "rl.reward.heldout",
        "rl.hacking",
        # ``reward_variant`` is the resolved value: writing the default out changes nothing.
        "rl.reward.variant",
    ),
)
STAGES = {spec.name: spec for spec in (SFT, STAGE1, STAGE2, STAGE3)}
PIPELINE_STAGES = ("stage1", "stage2", "stage3")

PIPELINE_FREE_ON_RESUME = (
    "pipeline",
    "plugins",
    "engine",
    "sft",
    "data.sft_examples",
    "models.policy_base",
    "rl.reward.failures",
    "rl.reward.retries",
    "rl.reward.probes",
    "rl.reward.heldout",
    "rl.save_every",
    "rl.hacking",
    "rl.reward.variant",
    "stage1.max_failure_rate",
    "stage2.save_every",
)
"""Settings of a run folder that may change while its pipeline is unfinished."""
PIPELINE_SAME_ON_RESUME = (
    # Decides which reward model stage III asks.
    "pipeline.rounds",
)
"""Exceptions below ``PIPELINE_FREE_ON_RESUME``."""


def is_same_in_pipeline(setting: str) -> bool:
    """Return whether the pipeline of a run folder must keep the value of ``setting``."""
    free = _longest_match(PIPELINE_FREE_ON_RESUME, setting)
    return free == 0 or _longest_match(PIPELINE_SAME_ON_RESUME, setting) > free


def setting(config: SparkConfig, name: str) -> str | None:
    """Return the value of the model or data setting with a dotted name."""
    return attrgetter(name)(config)


def required_setting(config: SparkConfig, name: str) -> str:
    """Return a model or data setting. Raises ``ConfigError`` if it is not set."""
    value = setting(config, name)
    if not value:
        raise ConfigError(f"{name} is not set; name a file or folder with {name}=PATH")
    return value


def _longest_match(prefixes: Sequence[str], name: str) -> int:
    """Return the length of the longest of ``prefixes`` that is ``name`` or a section above it."""
    matches = [p for p in prefixes if name == p or name.startswith(f"{p}.")]
    return max((len(match) for match in matches), default=0)
