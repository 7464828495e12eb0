"""Which commands the pipeline is made of, and which waits for which."""

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
    """The jobs in the order they should start; a baseline waits for nobody, and no arm for more
    than its own reward model.
    """
    pipeline, own, arms = config.pipeline, config.stage2.method, pipeline_rl_variants(config)
    if any(arm.comes_from_stage2(config) for arm in arms) and own not in pipeline.label_methods:
        raise ConfigError(
            f"stage2.method={own} rewards stage III: add it to pipeline.label_methods"
        )
    for arm in unsupported_rl_variants(config):
        log.info(
            "no arm %s: %s is made of step labels, which an ORM does not give", arm.name, arm.design
        )
    # The reward model's own method goes first: RL and later rounds wait for it, and only for it.
    methods = sorted(pipeline.label_methods, key=lambda method: method != own)
    labelling = _round_jobs(config, overrides, 1, methods[:1])
    for number in range(2, pipeline.rounds + 1):
        labelling += _round_jobs(config, overrides, number, [own])
    stage3 = [_stage3_job(config, overrides, arm) for arm in arms]
    return [*labelling, *stage3, *_stage2_jobs(config, overrides, 1, methods[1:])]


def _round_jobs(
    config: SparkConfig, overrides: Sequence[str], number: int, methods: Sequence[str]
) -> list[Job]:
    """Shards of verification data and the reward models made of them; a later round waits for its
    verifier.
    """
    shards, run, prefix = (
        parallel_jobs(config),
        round_run(config.run, number),
        _prefix(number),
    )
    verifier = (
        frozenset({_reward_model_job(config, number - 1, config.stage2.variant)})
        if number > 1
        else frozenset()
    )
    arguments = (
        "stage1",
        *overrides,
        *_round_overrides(config, number),
        f"stage1.num_shards={shards}",
    )
    stage1 = [
        Job(
            f"{prefix}stage1-{i}",
            (*arguments, f"stage1.shard={i}"),
            stage1_folder(run) / shard_name(replace(config.stage1, num_shards=shards, shard=i)),
            verifier,
        )
        for i in range(shards)
    ]
    return [*stage1, *_stage2_jobs(config, overrides, number, methods)]


def _stage2_jobs(
    config: SparkConfig, overrides: Sequence[str], number: int, methods: Sequence[str]
) -> list[Job]:
    run, prefix = round_run(config.run, number), _prefix(number)
    collected = frozenset(f"{prefix}stage1-{i}" for i in range(parallel_jobs(config)))
    jobs = []
    for method in methods:
        for variant in (
            config.reward_models if method == config.stage2.method else [config.stage2.variant]
        ):
            more = [f"stage2.method={method}"]
            if variant != config.stage2.variant:
                more.append(f"stage2.variant={variant}")
            folder = stage2_folder(run, method, variant)
            jobs.append(
                Job(
                    f"{prefix}stage2-{folder.name}",
                    ("stage2", *overrides, *_round_overrides(config, number), *more),
                    folder,
                    collected,
                )
            )
    return jobs


def _round_overrides(config: SparkConfig, number: int) -> list[str]:
    """What makes a later round: its own folder, the reward model before it as verifier, the same
    solutions.
    """
    if number == 1:
        return []
    before = stage2_folder(
        round_run(config.run, number - 1), config.stage2.method, config.stage2.variant
    )
    return [
        f"run.dir={round_run(config.run, number).dir}",
        f"models.verifier={before / 'model'}",
        "stage1.verifier_prompt=reward_model",
        f"stage1.reuse_solutions_from={stage1_folder(config.run) / 'store'}",
    ]


def _prefix(number: int) -> str:
    return "" if number == 1 else f"round{number}-"


def _reward_model_job(config: SparkConfig, number: int, variant: str) -> str:
    return (
        f"{_prefix(number)}stage2-{stage2_folder(config.run, config.stage2.method, variant).name}"
    )


def _stage3_job(config: SparkConfig, overrides: Sequence[str], arm: RLVariant) -> Job:
    arguments, needs = (
        ["stage3", *overrides, *rl_variant_overrides(config, arm)],
        frozenset(),
    )
    if arm.comes_from_stage2(config):
        needs = frozenset({_reward_model_job(config, config.pipeline.rounds, arm.variant)})
        if config.pipeline.rounds > 1:
            last = stage2_folder(
                round_run(config.run, config.pipeline.rounds), config.stage2.method, arm.variant
            )
            arguments.append(f"rl.reward.model={last / 'model'}")
    return Job(f"stage3-{arm.name}", tuple(arguments), stage3_folder(config.run, arm.name), needs)
