"""Run the real command on the toy task, in sizes that take seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from spark_nemo.toy.resolve import ASSETS

SMALL = [
    "+experiment=toy",
    "data.stage1_problems=toy:stage1:10",
    "data.rl_problems=toy:rl:40",
    "data.eval_problems=toy:eval:12",
    "data.processbench=toy:processbench:30",
    "stage1.solutions_per_problem=2",
    "stage1.verifications_per_solution=4",
    "stage2.batch_size=4",
    "stage2.epochs=2",
    "stage2.save_every=3",
    "rl.steps=6",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "rl.save_every=2",
    "rl.eval_every=3",
    "evaluation.samples_per_problem=2",
]
VERIFIER = ASSETS / "verifier"


def command(stage: str, run_dir: Path, *overrides: str) -> list[str]:
    """The command line of a small run of ``stage``."""
    return [
        sys.executable,
        "-m",
        "spark_nemo.cli.main",
        stage,
        *SMALL,
        f"run.dir={run_dir}",
        *overrides,
    ]


def run(stage: str, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit status is the caller's to look at."""
    line = command(stage, run_dir, *overrides)
    return subprocess.run(
        line, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def run_and_kill(stage: str, run_dir: Path, ready: Callable[[], bool], *overrides: str) -> None:
    """Start, wait until ``ready()``, then SIGKILL the process; fails when it ends before that."""
    process = subprocess.Popen(
        command(stage, run_dir, *overrides),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, f"{stage} ended before it could be killed"
        assert time.monotonic() < deadline, f"{stage} made no progress"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """One thread per process, no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def rows(path: Path) -> list[dict]:
    """Rows of a JSONL file without what depends on the clock."""
    if not path.exists():
        return []
    timed = {"seconds", "tokens_per_second"}
    complete = [line for line in path.read_text().split("\n")[:-1] if line]
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in complete]
