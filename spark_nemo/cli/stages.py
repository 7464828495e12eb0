"""``spark-nemo sft|stage1|stage2|stage3|pipeline``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from spark_nemo.cli.arguments import (
    add_command,
    add_config_arguments,
    add_dry_run_argument,
    configured,
    dry_run_only,
)
from spark_nemo.config import SparkConfig
from spark_nemo.run.stage_spec import STAGES
from spark_nemo.toy.resolve import oracle_for

STOPPED = 3
"""Exit status of a run that stopped on request; the same command resumes it."""


def add_stage_commands(commands: argparse._SubParsersAction) -> None:
    """Add the commands of the stages and of the pipeline."""
    for name, summary, run, examples in (
        ("sft", "teach the policy its response format, before stage III", _sft, ""),
        ("stage1", "sample solutions and verifications", _stage1, ""),
        (
            "stage2",
            "label solutions, fine-tune the reward model and score it",
            _stage2,
            "  spark-nemo stage2 +experiment=toy stage2.method=single --print-config\n",
        ),
        (
            "stage3",
            "train the policy with GRPO on the reward model's verdicts",
            _stage3,
            "  spark-nemo stage3 +experiment=toy rl.group_size=8 megatron.tensor_parallel=2\n",
        ),
        (
            "pipeline",
            "run all three stages and write the report",
            _pipeline,
            "  spark-nemo pipeline +experiment=spark/base --dry-run\n",
        ),
    ):
        first = f"examples:\n  spark-nemo {name} +experiment=toy run.dir=runs/first\n"
        command = add_command(commands, name, summary, run, examples=first + examples)
        add_config_arguments(command)
        add_dry_run_argument(command)
        if name == "stage3":
            command.add_argument(
                "--servers",
                action="append",
                default=[],
                metavar="ROLE=URL[,URL...]",
                help="use these running servers for policy or verifier (slurm/stage3_rl.sh passes "
                "them)",
            )


def _stage1(arguments: argparse.Namespace) -> int:
    from spark_nemo.stages.stage1 import run_stage1

    if dry_run_only(arguments, "stage1"):
        return 0
    config = configured(arguments)
    if config is not None and not _already_complete(config, "stage1"):
        run_stage1(config)
    return 0


def _sft(arguments: argparse.Namespace) -> int:
    from spark_nemo.stages.sft import run_sft, sft_data

    return _train(arguments, "sft", check=sft_data, run=run_sft)


def _stage2(arguments: argparse.Namespace) -> int:
    from spark_nemo.planning.preflight import check_stage2
    from spark_nemo.stages.stage2 import run_stage2

    return _train(arguments, "stage2", check=check_stage2, run=run_stage2)


def _stage3(arguments: argparse.Namespace) -> int:
    from spark_nemo.planning.preflight import check_stage3
    from spark_nemo.stages.stage3 import run_stage3

    return _train(arguments, "stage3", check=check_stage3, run=run_stage3)


def _pipeline(arguments: argparse.Namespace) -> int:
    from spark_nemo.stages.pipeline import run_pipeline

    if dry_run_only(arguments, "pipeline"):
        return 0
    config = configured(arguments)
    if config is None:
        return 0
    report = run_pipeline(config, arguments.overrides, oracle_for(config))
    if report is None:
        return STOPPED
    print(f"report: {report}")
    return 0


def _train(
    arguments: argparse.Namespace,
    stage: str,
    *,
    check: Callable[[SparkConfig], object],
    run: Callable[[SparkConfig], bool],
) -> int:
    """Run a stage that trains, on ranks of its own if the layout needs several."""
    from spark_nemo.cli.launch import launch_ranks, must_launch
    from spark_nemo.run.run_lock import run_lock

    if dry_run_only(arguments, stage):
        return 0
    config = configured(arguments)
    if config is None:
        return 0
    if stage == "stage3":
        config = _with_servers(config, arguments.servers)
    if _already_complete(config, stage):
        return 0
    if must_launch(config.megatron):
        check(config)
        # The main rank takes the lock; here it only fails early if another process holds it.
        with run_lock(STAGES[stage].folder(config)):
            pass
        return launch_ranks(config.megatron, arguments.command_line)
    return 0 if run(config) else STOPPED


def _with_servers(config: SparkConfig, servers: list[str]) -> SparkConfig:
    """Point pools at running servers, each given as ``ROLE=URL[,URL...]``."""
    engine = config.engine
    for given in servers:
        role, _, urls = given.partition("=")
        pool = engine.pool(role).found_at(urls.split(","))
        engine = replace(engine, **{role: pool})
    return replace(config, engine=engine)


def _already_complete(config: SparkConfig, stage: str) -> bool:
    """Return whether the stage run is complete, and print it; before any model is loaded."""
    from spark_nemo.run.completion import is_complete
    from spark_nemo.run.run_lock import is_main_rank

    if not is_complete(config, stage):
        return False
    if is_main_rank():
        print(
            f"{stage} is already complete in {STAGES[stage].folder(config)}; "
            "to run it again, use another run.dir"
        )
    return True
