"""The ``spark-nemo`` command: one subcommand per stage, and the whole pipeline. Overrides are
Hydra's.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from spark_nemo.cli.capacity import add_plan_command
from spark_nemo.cli.data import add_data_commands
from spark_nemo.cli.errors import USER_ERRORS
from spark_nemo.cli.evaluate import (
    add_compare_arguments,
    add_evaluate_arguments,
    compare_saved,
    overrides_after_data,
    score_model,
    score_saved,
)
from spark_nemo.cli.explain import add_explain_command
from spark_nemo.cli.slurm_manifest import add_plan_arguments, slurm_manifest
from spark_nemo.cli.status import run_status
from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.run.compose import compose_config, config_yaml
from spark_nemo.run.stage_spec import STAGES
from spark_nemo.run.subprocess_utils import die_with_parent
from spark_nemo.toy.resolve import oracle_for, resolve_toy

EXAMPLES = """examples:
  spark-nemo pipeline +experiment=toy run.dir=runs/first
  spark-nemo pipeline +experiment=spark/base --dry-run
  spark-nemo sft +experiment=toy run.dir=runs/first
  spark-nemo stage1 +experiment=toy run.dir=runs/first
  spark-nemo stage3 +experiment=toy rl.group_size=8 megatron.tensor_parallel=2
  spark-nemo stage2 +experiment=toy stage2.method=single --print-config
  spark-nemo report +experiment=toy run.dir=runs/first
  spark-nemo report compare old=runs/a0 old=runs/a1 new=runs/b0 new=runs/b1 --out runs/comparison
  spark-nemo evaluate math --model runs/first/stage3/process_aware/model +experiment=toy
  spark-nemo evaluate processbench --model models/chat --critic --data gsm8k.json math.json +experiment=spark/base
  spark-nemo evaluate processbench --predictions run1.jsonl run2.jsonl --data gsm8k.json
  spark-nemo plan --stage stage3 --nodes 6 +experiment=spark/base
  spark-nemo evaluate compare a.jsonl b.jsonl --data math500.jsonl aime24.jsonl
  spark-nemo data stats runs/first
  spark-nemo explain runs/first step_consistency:0df7a6
"""
STOPPED = 3
"""Exit status of a run that was asked to stop; the same command resumes it."""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Returns 0 when it finished, 2 on bad input (one line on stderr), 3 when
    asked to stop.
    """
    die_with_parent()
    arguments = _parse(argv)
    arguments.command_line = sys.argv[1:] if argv is None else argv
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    _quieten()
    try:
        return arguments.run(arguments)
    except USER_ERRORS as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        advice = ": make room where run.dir is; the same command goes on" if full else ""
        print(f"spark-nemo: error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spark-nemo: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand on both sides of a flag, which argparse alone takes for an
    error.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spark-nemo",
        description="Reference-free RL for reasoning models, in three stages.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, summary in (
        ("sft", _sft, "teach the policy its format, before stage III"),
        ("stage1", _stage1, "sample solutions and verifications"),
        ("stage2", _stage2, "label, fine-tune the reward model, score it"),
        ("stage3", _stage3, "GRPO with the reward model"),
    ):
        command = _config_command(commands, name, summary)
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="check and print the plan, start and write nothing",
        )
        command.set_defaults(run=run, part=name)
        if name == "stage3":
            command.add_argument(
                "--servers",
                action="append",
                default=[],
                metavar="ROLE=URL[,URL...]",
                help="slurm/stage3_rl.sh: where it has launched the servers of policy or verifier",
            )
    pipeline = _config_command(commands, "pipeline", "all three stages and the report")
    pipeline.add_argument(
        "--dry-run", action="store_true", help="check and print the plan, start and write nothing"
    )
    pipeline.set_defaults(run=_pipeline, part="pipeline")
    report = _config_command(
        commands,
        "report",
        "write summary.json and report.html of a run; `report compare RUN...` compares over seeds",
    )
    report.add_argument(
        "--out", type=Path, help="with compare: folder for compare.md and compare.html"
    )
    report.set_defaults(run=_report)
    evaluate = commands.add_parser(
        "evaluate", help="score a model, or saved outputs: mathematics or ProcessBench"
    )
    kinds = evaluate.add_subparsers(required=True, metavar="BENCHMARK")
    for kind, summary in (
        ("math", "held-out problems by their final answers"),
        ("processbench", "finding the first wrong step"),
    ):
        command = _config_command(kinds, kind, summary)
        add_evaluate_arguments(kind, command)
        command.set_defaults(run=partial(_evaluate, kind))
    command = kinds.add_parser(
        "compare", help="two runs of `evaluate math`, paired problem by problem"
    )
    add_compare_arguments(command)
    command.set_defaults(run=_evaluate_compare)
    plan = _config_command(
        commands,
        "slurm-manifest",
        "check a configuration and tell the scripts in slurm/ what it needs",
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=_slurm_manifest)
    status = commands.add_parser(
        "status", help="how far a run is, here or on a cluster, from its files only"
    )
    status.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder (run.dir)")
    status.set_defaults(run=_status)
    add_plan_command(commands)
    add_data_commands(commands)
    add_explain_command(commands)
    toy = commands.add_parser(
        "toy", help="build the small world's base models from a seed (the shipped ones were)"
    )
    toy.add_argument(
        "--out", type=Path, required=True, help="folder for generator/, verifier/ and critic/"
    )
    toy.add_argument("--seed", type=int, default=0)
    toy.set_defaults(run=_toy)
    return parser


def _examples(name: str) -> str | None:
    """Those of one subcommand."""
    head, *lines = EXAMPLES.splitlines()
    own = [line for line in lines if f" {name} " in line]
    return "\n".join([head, *own]) if own else None


def _config_command(
    commands: argparse._SubParsersAction, name: str, summary: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=_examples(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "overrides", nargs="*", help="Hydra overrides: +experiment=NAME, section.key=value"
    )
    command.add_argument(
        "--print-config", action="store_true", help="show the resolved configuration and exit"
    )
    return command


def _configured(arguments: argparse.Namespace) -> SparkConfig | None:
    config = compose_config(arguments.overrides)
    if arguments.print_config:
        print(config_yaml(config), end="")
        return None
    return resolve_toy(config)


def _planned(arguments: argparse.Namespace) -> bool:
    """Print the plan of the subcommand when that is all that was asked."""
    if not arguments.dry_run or arguments.print_config:
        return False
    from spark_nemo.planning.dry_run import dry_run

    print(dry_run(compose_config(arguments.overrides), arguments.part))
    return True


def _sft(arguments: argparse.Namespace) -> int:
    def check(config: SparkConfig) -> None:
        from spark_nemo.stages.sft import sft_data

        sft_data(config)

    def run(config: SparkConfig) -> bool:
        from spark_nemo.stages.sft import run_sft

        return run_sft(config)

    return _on_all_ranks(arguments, check, run)


def _stage1(arguments: argparse.Namespace) -> int:
    from spark_nemo.stages.stage1 import run_stage1

    if _planned(arguments):
        return 0
    config = _configured(arguments)
    if config is not None and not _finished(config, "stage1"):
        run_stage1(config)
    return 0


def _finished(config: SparkConfig, stage: str) -> bool:
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


def _stage2(arguments: argparse.Namespace) -> int:
    def run(config: SparkConfig) -> bool:
        from spark_nemo.stages.stage2 import run_stage2

        return run_stage2(config)

    from spark_nemo.planning.preflight import check_stage2

    return _on_all_ranks(arguments, check_stage2, run)


def _stage3(arguments: argparse.Namespace) -> int:
    def run(config: SparkConfig) -> bool:
        from spark_nemo.stages.stage3 import run_stage3

        return run_stage3(config)

    from spark_nemo.planning.preflight import check_stage3

    return _on_all_ranks(arguments, check_stage3, run)


def _on_all_ranks(
    arguments: argparse.Namespace,
    check: Callable[[SparkConfig], None],
    run: Callable[[SparkConfig], bool],
) -> int:
    from spark_nemo.cli.launch import launch_ranks, must_launch
    from spark_nemo.run.run_lock import run_lock

    if _planned(arguments):
        return 0
    config = _configured(arguments)
    if config is None:
        return 0
    for servers in getattr(arguments, "servers", ()):
        role, _, urls = servers.partition("=")
        config.engine.pool(role)  # a role that does not exist
        config = replace(
            config,
            engine=replace(
                config.engine, **{role: config.engine.pool(role).found_at(urls.split(","))}
            ),
        )
    if _finished(config, arguments.part):
        return 0
    if must_launch(config.megatron):
        check(config)
        with run_lock(
            STAGES[arguments.part].folder(config)
        ):  # the main rank takes it; here it only refuses before ranks are started
            pass
        return launch_ranks(config.megatron, arguments.command_line)
    return 0 if run(config) else STOPPED


def _pipeline(arguments: argparse.Namespace) -> int:
    from spark_nemo.stages.pipeline import run_pipeline

    if _planned(arguments):
        return 0
    config = _configured(arguments)
    if config is None:
        return 0
    report = run_pipeline(config, arguments.overrides, oracle_for(config))
    if report is None:
        return STOPPED
    print(f"report: {report}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.overrides[:1] == ["compare"]:
        return _compare(arguments.overrides[1:], arguments.out)
    if arguments.out is not None:
        raise ConfigError("--out has no effect without compare: a run's report goes into run.dir")
    from spark_nemo.report.collect_summary import collect_summary
    from spark_nemo.report.page import write_report

    for word in arguments.overrides:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(
                f"{word}: name the run as run.dir={word}, with the overrides that its stages had"
            )
    if config := _configured(arguments):
        if not any((Path(config.run.dir) / stage).is_dir() for stage in STAGES):
            raise ConfigError(
                f"run.dir={config.run.dir}: no stage has been run there, there is nothing to report"
            )
        print(
            f"report: {write_report(config.run.dir, collect_summary(config, oracle_for(config)))}"
        )
    return 0


def _compare(runs: list[str], out: Path | None) -> int:
    from spark_nemo.report.seed_comparison import (
        compare_runs,
        comparison_markdown,
        read_runs,
        write_comparison,
    )

    comparison = compare_runs(read_runs(runs))
    print(comparison_markdown(comparison), end="")
    if out is not None:
        print(f"page: {write_comparison(out, comparison)}")
    return 0


def _evaluate(kind: str, arguments: argparse.Namespace) -> int:
    overrides_after_data(arguments)
    if arguments.predictions is not None:
        print(score_saved(kind, arguments))
    elif config := _configured(arguments):
        print(score_model(kind, config, arguments))
    return 0


def _evaluate_compare(arguments: argparse.Namespace) -> int:
    print(compare_saved(arguments))
    return 0


def _slurm_manifest(arguments: argparse.Namespace) -> int:
    from spark_nemo.planning.dry_run import check_without_files

    if config := _configured(arguments):
        if arguments.stage == "pipeline":
            check_without_files(compose_config(arguments.overrides))
        print(slurm_manifest(config, arguments))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    print(run_status(arguments.run_dir))
    return 0


def _toy(arguments: argparse.Namespace) -> int:
    from spark_nemo.toy.pretrain import build_models

    build_models(arguments.out, arguments.seed)
    return 0


def _quieten() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"megatron\..*|torch\..*|spark_nemo\.megatron\..*"
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("megatron", "torch", "hydra", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
