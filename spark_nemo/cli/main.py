"""The ``spark-nemo`` command: subcommands for each stage, the whole pipeline, and tools."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from pathlib import Path

from spark_nemo.cli.arguments import CommandParser, add_command, parse_arguments
from spark_nemo.cli.capacity import add_plan_command
from spark_nemo.cli.data import add_data_commands
from spark_nemo.cli.errors import USER_ERRORS
from spark_nemo.cli.evaluate import add_evaluate_commands
from spark_nemo.cli.explain import add_explain_command
from spark_nemo.cli.report import add_report_command
from spark_nemo.cli.slurm_manifest import add_slurm_manifest_command
from spark_nemo.cli.stages import add_stage_commands
from spark_nemo.cli.status import add_status_command
from spark_nemo.run.subprocess_utils import die_with_parent

EXAMPLES = """examples:
  spark-nemo pipeline +experiment=toy run.dir=runs/first
  spark-nemo pipeline +experiment=spark/base --dry-run
  spark-nemo stage3 +experiment=toy rl.group_size=8 megatron.tensor_parallel=2
  spark-nemo status runs/first
  spark-nemo report compare old=runs/a0 old=runs/a1 new=runs/b0 new=runs/b1 --out runs/comparison
  spark-nemo evaluate math --model runs/first/stage3/process_aware/model +experiment=toy
  spark-nemo plan --stage stage3 --nodes 6 +experiment=spark/base
  spark-nemo COMMAND --help

exit status: 0 finished, 2 invalid input (one line on stderr), 3 stopped on request (the same
command resumes), 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit status, as listed in ``EXAMPLES``."""
    die_with_parent()
    arguments = parse_arguments(build_parser(), argv)
    arguments.command_line = sys.argv[1:] if argv is None else argv
    _set_up_logging()
    try:
        return arguments.run(arguments)
    except USER_ERRORS as error:
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message += ": free space on the disk of run.dir; the same command resumes"
        print(f"spark-nemo: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spark-nemo: interrupted; the same command resumes", file=sys.stderr)
        return 130


def build_parser() -> CommandParser:
    """Return the parser of the whole command line."""
    parser = CommandParser(
        prog="spark-nemo",
        description="Reference-free RL for reasoning models, in three stages.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_stage_commands(commands)
    add_report_command(commands)
    add_evaluate_commands(commands)
    add_status_command(commands)
    add_data_commands(commands)
    add_explain_command(commands)
    add_plan_command(commands)
    add_slurm_manifest_command(commands)
    _add_toy_command(commands)
    return parser


def _add_toy_command(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands, "toy", "train the toy task's base models from a seed, as those shipped were", _toy
    )
    command.add_argument(
        "--out", type=Path, required=True, help="folder for generator/, verifier/ and critic/"
    )
    command.add_argument("--seed", type=int, default=0)


def _toy(arguments: argparse.Namespace) -> int:
    from spark_nemo.toy.pretrain import build_models

    build_models(arguments.out, arguments.seed)
    return 0


def _set_up_logging() -> None:
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"megatron\..*|torch\..*|spark_nemo\.megatron\..*"
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("megatron", "torch", "hydra", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
