"""The toy task on the test cluster: a user's commands, in sizes that take seconds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cluster import Cluster

REPO = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(REPO), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
ASSETS = REPO / "spark_nemo/toy/assets"
SMALL = [
    "+experiment=toy",
    "data.stage1_problems=toy:stage1:8",
    "data.rl_problems=toy:rl:40",
    "data.eval_problems=toy:eval:4",
    "data.processbench=toy:processbench:12",
    "pipeline.rl_answers=toy:rl:40",
    "stage1.solutions_per_problem=2",
    "stage1.verifications_per_solution=4",
    "stage2.batch_size=4",
    "stage2.epochs=1",
    "stage2.save_every=50",
    "rl.steps=4",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "rl.save_every=50",
    "rl.eval_every=50",
    "evaluation.samples_per_problem=1",
]
RL = [*SMALL, f"rl.reward.model={ASSETS / 'verifier'}", "megatron.data_parallel=2"]
"""Stage III on two ranks without stages I and II: the shipped verifier rewards."""
BATCH = ("--time=10", "--exclusive")


def site(folder: Path, **settings: object) -> dict[str, str]:
    """A site file with ``settings``, and the environment that names it."""
    path = folder / "site.env"
    values = {"PYTHON": sys.executable, **settings}
    path.write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))
    return {
        "SPARK_NEMO_SITE": str(path),
        "PYTHONPATH": PYTHONPATH,
        "HF_HUB_OFFLINE": "1",
        "SPARK_NEMO_CONF": str(REPO / "conf"),
    }


def submit(
    slurm: Cluster,
    folder: Path,
    script: str,
    *arguments: object,
    overrides: list[str],
    options: tuple[object, ...] = (),
    **settings: object,
) -> int:
    """Submit one of the scripts from ``folder``; its output goes to ``folder/out-<job>.txt``."""
    return slurm.sbatch(
        *BATCH,
        "--output=out-%A.txt",
        *options,
        REPO / "slurm" / script,
        *arguments,
        "--",
        *overrides,
        env=site(folder, **settings),
        cwd=folder,
    )


def output(folder: Path, job: int) -> str:
    """Return the output of a job's batch script so far."""
    path = folder / f"out-{job}.txt"
    return path.read_text() if path.exists() else ""


def rows(path: Path) -> list[dict]:
    """Rows of a JSONL file without what depends on the clock."""
    if not path.exists():
        return []
    timed = {"seconds", "tokens_per_second"}
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed}
        for line in path.read_text().splitlines()
    ]


def logged(run_dir: Path, part: str, pattern: str = "*") -> str:
    """The log files of the latest attempt, one after the other."""
    folder = run_dir / "logs" / part / "latest"
    return "".join(
        f"== {path.name}\n{path.read_text()}"
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    )


def environment_of_this_process() -> dict[str, str]:
    """For commands that run outside Slurm."""
    return {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
