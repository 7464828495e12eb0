"""``spark-nemo report``: the report of one run, or a comparison of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from spark_nemo.cli.arguments import (
    add_command,
    add_config_arguments,
    configured,
    require_override,
)
from spark_nemo.config import ConfigError
from spark_nemo.run.stage_spec import STAGES
from spark_nemo.toy.resolve import oracle_for

EXAMPLES = """examples:
  spark-nemo report +experiment=toy run.dir=runs/first
  spark-nemo report compare old=runs/a0 old=runs/a1 new=runs/b0 new=runs/b1 --out runs/comparison
"""


def add_report_command(commands: argparse._SubParsersAction) -> None:
    """Add ``report``."""
    command = add_command(
        commands,
        "report",
        "write a run's summary.json and report.html, or compare runs over seeds",
        _report,
        examples=EXAMPLES,
        description="Write summary.json and report.html of a run, from the overrides that its "
        "stages had.\n`report compare NAME=RUN ...` compares groups of runs; runs of one name are "
        "seeds of one group.",
    )
    add_config_arguments(command)
    command.add_argument(
        "--out", type=Path, help="with compare: folder for compare.md and compare.html"
    )


def _report(arguments: argparse.Namespace) -> int:
    from spark_nemo.report.collect_summary import collect_summary
    from spark_nemo.report.page import write_report

    if arguments.overrides[:1] == ["compare"]:
        return _compare(arguments.overrides[1:], arguments.out)
    if arguments.out is not None:
        raise ConfigError("--out has no effect without compare: a report is written to run.dir")
    for word in arguments.overrides:
        require_override(word)
    config = configured(arguments)
    if config is None:
        return 0
    if not any((Path(config.run.dir) / stage).is_dir() for stage in STAGES):
        raise ConfigError(
            f"run.dir={config.run.dir}: no stage has run there; run one first, or name another "
            "folder"
        )
    summary = collect_summary(config, oracle_for(config))
    print(f"report: {write_report(config.run.dir, summary)}")
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
