"""The pipeline's commands and their dependencies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.run.local_executor import Job, parallel_jobs
from spark_nemo.run.rl_variants import (
    RLVariant,
    pipeline_rl_variants,
    rl_variant_overrides,
    unsupported_rl_variants,
)
from spark_nemo.run.run_folder import (
    round_run,
    shard_name,
    stage1_folder,
    stage2_folder,
    stage3_folder,
)

log = logging.getLogger(__name__)


def build_job_graph(config: SparkConfig, overrides: Sequence[str]) -> list[Job]:
    """Return the jobs in the order in which they should start.

    A baseline does not wait for any job, an RL variant only for its own reward model.
    """
    pipeline = config.pipeline
    own_method = config.stage2.method
    variants = pipeline_rl_variants(config)
    needs_own_method = any(variant.comes_from_stage2(config) for variant in variants)
    if needs_own_method and own_method not in pipeline.label_methods:
        raise ConfigError(
            f"stage2.method={own_method}: its reward model rewards stage III; add it to "
            "pipeline.label_methods"
        )
    for variant in unsupported_rl_variants(config):
        log.info(
            "RL variant %s is left out: %s needs step labels, and an ORM produces none",
            variant.name,
            variant.design,
        )
    # stage2.method goes first: RL and later rounds wait for its reward model, and for no other.
    other_methods = [method for method in pipeline.label_methods if method != own_method]
    first_methods = [own_method] if own_method in pipeline.label_methods else other_methods[:1]
    jobs = _round_jobs(config, overrides, 1, first_methods)
    for number in range(2, pipeline.rounds + 1):
        jobs += _round_jobs(config, overrides, number, [own_method])
    jobs += [_stage3_job(config, overrides, variant) for variant in variants]
    later_methods = [method for method in other_methods if method not in first_methods]
    return jobs + _stage2_jobs(config, overrides, 1, later_methods)


def _round_jobs(
    config: SparkConfig, overrides: Sequence[str], number: int, methods: Sequence[str]
) -> list[Job]:
    """Return a round's shards of stage I and reward models; a later round needs its verifier."""
    num_shards = parallel_jobs(config)
    run = round_run(config.run, number)
    after: frozenset[str] = frozenset()
    if number > 1:
        after = frozenset({_reward_model_job(config, number - 1, config.stage2.variant)})
    jobs = []
    for shard in range(num_shards):
        stage1 = replace(config.stage1, num_shards=num_shards, shard=shard)
        arguments = (
            "stage1",
            *overrides,
            *_round_overrides(config, number),
            f"stage1.num_shards={num_shards}",
            f"stage1.shard={shard}",
        )
        folder = stage1_folder(run) / shard_name(stage1)
        jobs.append(Job(_stage1_job(number, shard), arguments, folder, after))
    return jobs + _stage2_jobs(config, overrides, number, methods)


def _stage2_jobs(
    config: SparkConfig, overrides: Sequence[str], number: int, methods: Sequence[str]
) -> list[Job]:
    """Return the reward models of a round; only ``stage2.method`` has one of every kind."""
    run = round_run(config.run, number)
    after = frozenset(_stage1_job(number, shard) for shard in range(parallel_jobs(config)))
    jobs = []
    for method in methods:
        is_own = method == config.stage2.method
        kinds = config.reward_models if is_own else [config.stage2.variant]
        for kind in kinds:
            own = [f"stage2.method={method}"]
            if kind != config.stage2.variant:
                own.append(f"stage2.variant={kind}")
            arguments = ("stage2", *overrides, *_round_overrides(config, number), *own)
            folder = stage2_folder(run, method, kind)
            jobs.append(Job(f"{_prefix(number)}stage2-{folder.name}", arguments, folder, after))
    return jobs


def _stage3_job(config: SparkConfig, overrides: Sequence[str], variant: RLVariant) -> Job:
    arguments = ["stage3", *overrides, *rl_variant_overrides(config, variant)]
    after: frozenset[str] = frozenset()
    if variant.comes_from_stage2(config):
        last_round = config.pipeline.rounds
        after = frozenset({_reward_model_job(config, last_round, variant.variant)})
        if last_round > 1:
            run = round_run(config.run, last_round)
            folder = stage2_folder(run, config.stage2.method, variant.variant)
            arguments.append(f"rl.reward.model={folder / 'model'}")
    folder = stage3_folder(config.run, variant.name)
    return Job(f"stage3-{variant.name}", tuple(arguments), folder, after)


def _round_overrides(config: SparkConfig, number: int) -> list[str]:
    """Return what makes a later round.

    It has its own folder, the reward model before it as verifier, and the same solutions.
    """
    if number == 1:
        return []
    before = round_run(config.run, number - 1)
    verifier = stage2_folder(before, config.stage2.method, config.stage2.variant) / "model"
    return [
        f"run.dir={round_run(config.run, number).dir}",
        f"models.verifier={verifier}",
        "stage1.verifier_prompt=reward_model",
        f"stage1.reuse_solutions_from={stage1_folder(config.run) / 'store'}",
    ]


def _stage1_job(number: int, shard: int) -> str:
    return f"{_prefix(number)}stage1-{shard}"


def _reward_model_job(config: SparkConfig, number: int, kind: str) -> str:
    folder = stage2_folder(config.run, config.stage2.method, kind)
    return f"{_prefix(number)}stage2-{folder.name}"


def _prefix(number: int) -> str:
    return "" if number == 1 else f"round{number}-"
