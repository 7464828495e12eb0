"""The whole chain: ``slurm/pipeline.sh`` on five nodes against ``spark-nemo pipeline`` on one
machine.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cluster import Cluster
from slurm_world import REPO, SMALL, environment_of_this_process, site

from spark_nemo.records.store import RecordStore

CHAIN = [
    *SMALL,
    "pipeline.label_methods=[step_consistency]",
    "pipeline.rewards=[process_aware,rlvr]",
    "pipeline.parallel_jobs=2",
    "megatron.data_parallel=2",
]


def without_clock(tree: object) -> object:
    """A summary without what depends on the machine's speed, the folder's name or the command."""
    hidden = {
        "title",
        "seconds",
        "environment",
        "commands",
        "train_seconds",
        "tokens_per_second",
        "created",
    }
    if isinstance(tree, dict):
        return {key: without_clock(value) for key, value in tree.items() if key not in hidden}
    return [without_clock(value) for value in tree] if isinstance(tree, list) else tree


def test_the_chain_ends_with_the_report_of_one_machine(slurm: Cluster, tmp_path: Path) -> None:
    """The pipeline's jobs on two nodes over gloo give every figure of one machine.

    Jobs: an array of shards, stage II, both RL variants of stage III, the report, and evaluate.sh
    for the policy. The names of checkout and run folder have spaces and quotes, and the jobs are
    submitted from a third folder. Embedded engines only; rollout servers and speed are not tested.
    """
    checkout = tmp_path / "my check out"
    for name in ("slurm", "spark_nemo", "conf"):
        shutil.copytree(
            REPO / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "site.env")
        )
    elsewhere, run = tmp_path / "elsewhere", tmp_path / 'it\'s "run" {1}, x=y'
    elsewhere.mkdir()
    quoted = str(run).replace('"', '\\"')
    env = {
        **site(tmp_path),
        "PYTHONPATH": str(checkout),
        "SPARK_NEMO_CONF": str(checkout / "conf"),
        "SBATCH_EXCLUSIVE": "exclusive",
        "SBATCH_TIMELIMIT": "10",
    }
    submitted = slurm.run(
        checkout / "slurm/pipeline.sh",
        "--shards",
        2,
        "--train-nodes",
        2,
        "--",
        *CHAIN,
        f'run.dir="{quoted}"',
        env=env,
        cwd=elsewhere,
    )
    jobs = [int(job) for job in submitted.stdout.splitlines()[-1].split()]
    assert len(jobs) == 5, submitted.stdout
    ended = [slurm.wait_state(job, timeout=300)["JobState"] for job in jobs]
    outputs = "".join(path.read_text() for path in (run / "logs/slurm").glob("*.out"))
    assert ended == ["COMPLETED"] * 5, outputs
    status = slurm.run(sys.executable, "-m", "spark_nemo.cli.main", "status", run, env=env).stdout
    assert [line.split()[1] for line in status.splitlines()[1:]] == ["done"] * 6, status
    ranks = {path.name for path in (run / "logs/stage3/process_aware/latest").iterdir()}
    assert {"trainer-0.log", "trainer-1.log", "job.log"} <= ranks

    model = run / "stage3/process_aware/model"
    job = slurm.sbatch(
        "--output=out.txt",
        checkout / "slurm/evaluate.sh",
        "--model",
        model,
        "--",
        *CHAIN,
        f'run.dir="{quoted}"',
        env=env,
        cwd=elsewhere,
    )
    ended, said = slurm.wait_state(job)["JobState"], (elsewhere / "out.txt").read_text()
    assert ended == "COMPLETED" and "4 problems: sampled" in said, said

    local = tmp_path / "local"
    command = [sys.executable, "-m", "spark_nemo.cli.main", "pipeline", *CHAIN, f"run.dir={local}"]
    done = subprocess.run(
        command, env=environment_of_this_process(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    on_cluster, here = (
        json.loads((folder / "summary.json").read_text()) for folder in (run, local)
    )
    assert without_clock(on_cluster) == without_clock(here)
    assert (run / "report.html").stat().st_size > 10_000


def test_two_chains_at_once_share_nothing(slurm: Cluster, tmp_path: Path) -> None:
    """Two whole chains, submitted together to nodes that may be shared, of two seeds: both end,
    each with its own seed in its report and its own problems in its store. Does not compare their
    figures with an undisturbed run.
    """
    jobs, runs = [], [tmp_path / f"seed {seed}" for seed in (0, 1)]
    options = ["pipeline.rewards=[process_aware]", "pipeline.rl_answers=null", "rl.steps=2"]
    for seed, run in enumerate(runs):
        submitted = slurm.run(
            REPO / "slurm/pipeline.sh",
            "--shards",
            1,
            "--train-nodes",
            2,
            "--",
            *CHAIN,
            *options,
            f"run.seed={seed}",
            f'run.dir="{run}"',
            env={**site(tmp_path), "SBATCH_TIMELIMIT": "10"},
            cwd=tmp_path,
        )
        jobs += [int(job) for job in submitted.stdout.splitlines()[-1].split()]
    assert len(jobs) == 8
    ended = [slurm.wait_state(job, timeout=400)["JobState"] for job in jobs]
    said = "".join(path.read_text() for run in runs for path in (run / "logs/slurm").glob("*.out"))
    assert ended == ["COMPLETED"] * 8, said
    stores = []
    for seed, run in enumerate(runs):
        assert json.loads((run / "summary.json").read_text())["seeds"] == [seed]
        with RecordStore(run / "stage1/store") as store:
            stores.append(store.keys("solution"))
    assert not stores[0] & stores[1] and all(stores)
