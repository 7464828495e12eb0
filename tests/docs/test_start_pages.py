"""The start pages' commands, run as far as a machine without a GPU allows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
DOCS = REPO / "docs"
SMALL = [
    "data.stage1_problems=toy:stage1:10",
    "data.rl_problems=toy:rl:40",
    "data.eval_problems=toy:eval:12",
    "data.processbench=toy:processbench:30",
    "stage1.solutions_per_problem=2",
    "stage1.verifications_per_solution=4",
    "stage2.batch_size=4",
    "stage2.epochs=1",
    "rl.steps=2",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "evaluation.samples_per_problem=2",
]
"""Overrides that make a documented command of the toy task take seconds."""


def commands(page: str) -> list[list[str]]:
    """Return the words after ``spark-nemo`` of every command in the page's code blocks."""
    found = []
    for block in re.findall(
        r"^```\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    ):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"\.venv/bin/spark-nemo (.*)", line):
                found.append(shlex.split(match[1], comments=True))
    return found


def spark_nemo(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in ``folder``, where relative paths of the page are then created."""
    line = [sys.executable, "-m", "spark_nemo.cli.main", *words]
    return subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )


def starts_nothing(words: list[str]) -> bool:
    """True for a command that only checks, plans or prints."""
    return words[0] == "plan" or "--dry-run" in words or "--print-config" in words


@pytest.mark.parametrize(
    "words",
    [
        words
        for page in ("start_laptop.md", "start_one_machine.md")
        for words in commands(page)
        if starts_nothing(words)
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_a_documented_check_passes(words: list[str], tmp_path: Path) -> None:
    """Prove that dry runs and plans of the start pages end with status 0 without models or GPUs.

    It does not prove that the planned run would work on a GPU.
    """
    done = spark_nemo(words, tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_laptop_page_works_from_top_to_bottom(tmp_path: Path) -> None:
    """Prove that the laptop page's pipeline, status and statistics work, with fewer problems."""
    queries = [words for words in commands("start_laptop.md") if words[0] in ("status", "data")]
    assert queries

    done = spark_nemo(["pipeline", "+experiment=toy", "run.dir=runs/demo", *SMALL], tmp_path)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 10_000
    for words in queries:
        answer = spark_nemo(words, tmp_path)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.strip()
