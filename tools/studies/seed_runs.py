"""Repeat a ``spark-nemo`` command over seeds, and the arguments of the tools that do so."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def seed_arguments(description: str, seeds: Sequence[int], runs: str) -> argparse.ArgumentParser:
    """Return a parser with --seeds, --runs, --out and Hydra overrides."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--runs", type=Path, default=Path(runs), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    return parser


def command_line(tool: str, arguments: argparse.Namespace, *options: str) -> str:
    """Return the command that repeats a tool's call, for the document that it writes."""
    seeds = [str(seed) for seed in dict.fromkeys(arguments.seeds)]
    words = ["python", f"tools/{tool}.py", "--seeds", *seeds, *options, *arguments.overrides]
    return " ".join(words)


def run_seeds(
    command: str, arguments: argparse.Namespace, overrides: Sequence[str]
) -> Iterator[tuple[int, Path, list[str]]]:
    """Run ``spark-nemo COMMAND`` for each seed; yield seed, run folder and the run's overrides.

    Stages that are finished are not run again. Exits with the status of the first run that fails.
    """
    for seed in dict.fromkeys(arguments.seeds):
        folder = arguments.runs / f"seed-{seed}"
        words = [*overrides, *arguments.overrides, f"run.dir={folder}", f"run.seed={seed}"]
        status = subprocess.call([sys.executable, "-m", "spark_nemo.cli.main", command, *words])
        if status:
            raise SystemExit(status)
        yield seed, folder, words
