"""Which commands the pipeline is made of, and which waits for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.rl import VERIFIER_KNOBS
from spark_nemo.stages.jobs import Job
from spark_nemo.stages.run_folder import round_run, stage1_folder, stage2_folder, stage3_folder
from spark_nemo.stages.stage1 import shard_name


def plan_jobs(config: SparkConfig, overrides: Sequence[str]) -> list[Job]:
    """The jobs in the order they should start; the answer-key baseline waits for nobody."""
    pipeline, own = config.pipeline, config.stage2.method
    if "process_aware" in pipeline.rewards and own not in pipeline.label_methods:
        raise ConfigError(f"stage2.method={own} rewards stage III: add it to pipeline.label_methods")
    # The reward model's own method goes first: RL and later rounds wait for it, and only for it.
    methods = sorted(pipeline.label_methods, key=lambda method: method != own)
    labelling = _round_jobs(config, overrides, 1, methods[:1])
    for number in range(2, pipeline.rounds + 1):
        labelling += _round_jobs(config, overrides, number, [own])
    stage3 = [_stage3_job(config, overrides, reward) for reward in pipeline.rewards]
    return [*labelling, *stage3, *_stage2_jobs(config, overrides, 1, methods[1:])]


def _round_jobs(config: SparkConfig, overrides: Sequence[str], number: int, methods: Sequence[str]) -> list[Job]:
    """Shards of verification data and the reward models made of them; a later round waits for its verifier."""
    shards, run, prefix = config.pipeline.parallel_jobs, round_run(config.run, number), _prefix(number)
    verifier = frozenset({_reward_model_job(config, number - 1)}) if number > 1 else frozenset()
    arguments = ("stage1", *overrides, *_round_overrides(config, number), f"stage1.num_shards={shards}")
    stage1 = [
        Job(f"{prefix}stage1-{i}", (*arguments, f"stage1.shard={i}"),
            stage1_folder(run) / shard_name(replace(config.stage1, num_shards=shards, shard=i)), verifier)
        for i in range(shards)
    ]
    return [*stage1, *_stage2_jobs(config, overrides, number, methods)]


def _stage2_jobs(config: SparkConfig, overrides: Sequence[str], number: int, methods: Sequence[str]) -> list[Job]:
    run, prefix = round_run(config.run, number), _prefix(number)
    collected = frozenset(f"{prefix}stage1-{i}" for i in range(config.pipeline.parallel_jobs))
    return [Job(f"{prefix}stage2-{m}", ("stage2", *overrides, *_round_overrides(config, number), f"stage2.method={m}"),
                stage2_folder(run, m), collected) for m in methods]


def _round_overrides(config: SparkConfig, number: int) -> list[str]:
    """What makes a later round: its own folder, the reward model before it as verifier, the same solutions."""
    if number == 1:
        return []
    before = stage2_folder(round_run(config.run, number - 1), config.stage2.method)
    return [f"run.dir={round_run(config.run, number).dir}", f"models.verifier={before / 'model'}",
            "stage1.verifier_prompt=reward_model", f"stage1.solutions_from={stage1_folder(config.run) / 'store'}"]


def _prefix(number: int) -> str:
    return "" if number == 1 else f"round{number}-"


def _reward_model_job(config: SparkConfig, number: int) -> str:
    return f"{_prefix(number)}stage2-{config.stage2.method}"


def _stage3_job(config: SparkConfig, overrides: Sequence[str], reward: str) -> Job:
    arguments = ["stage3", *overrides, f"rl.reward={reward}"]
    needs = frozenset({_reward_model_job(config, config.pipeline.rounds)})
    if reward != "rlvr" and config.pipeline.rounds > 1 and config.rl.reward_model is None:
        last = stage2_folder(round_run(config.run, config.pipeline.rounds), config.stage2.method)
        arguments.append(f"rl.reward_model={last / 'model'}")
    if reward == "rlvr":
        if config.pipeline.rl_answers is None:
            raise ConfigError("pipeline.rewards has rlvr: set pipeline.rl_answers (JSONL with problem_id and answer)")
        arguments += [f"data.rl_answers={config.pipeline.rl_answers}", "rl.reward_model=null"]
        arguments += [f"rl.{name}={'null' if unset is None else unset}" for name, unset in VERIFIER_KNOBS.items()
                      if getattr(config.rl, name) != unset]
        arguments += [f"rl.hacking.{name}={'null' if unset is None else str(unset).lower()}" for name, unset in
                      config.rl.hacking.unread(reward, asks_reward_model=False).items()]
        needs = frozenset()
    return Job(f"stage3-{reward}", tuple(arguments), stage3_folder(config.run, reward), needs)
