"""The chain with real SGLang servers in stage III. They need half a minute to start and an
environment of their own: skipped unless $SPARK_SGLANG_PYTHON names its Python (``make test-slurm``
does when ``make test-sglang`` has built it).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_world import REPO, SMALL, logged, rows, site

pytestmark = pytest.mark.skipif(
    "SPARK_SGLANG_PYTHON" not in os.environ, reason="$SPARK_SGLANG_PYTHON is not set"
)
STAGE_RUN = "stage3/process_aware"


@pytest.mark.timeout(900)
def test_chain_with_servers_on_nodes_of_their_own_and_one_killed(
    slurm: Cluster, tmp_path: Path
) -> None:
    """Shards, stage II, then two trainer ranks over gloo, a policy server that takes their weights
    and a verifier server that rewards, each on its own node. The policy server is killed after the
    first step, comes back at its address, and the run ends with the report. SGLang 0.5.21 on a CPU
    with a torch stand-in for its kernels.
    """
    run = tmp_path / "run"
    overrides = [
        *(word for word in SMALL if "rl_answers" not in word),
        "pipeline.label_methods=[step_consistency]",
        "pipeline.rewards=[process_aware]",
        "pipeline.rl_answers=null",
        "megatron.data_parallel=2",
        f"run.dir={run}",
    ]
    submitted = slurm.run(
        REPO / "slurm/pipeline.sh",
        "--shards",
        2,
        "--train-nodes",
        2,
        "--policy-nodes",
        1,
        "--verifier-nodes",
        1,
        "--stage3-override",
        "+engine=sglang_cpu",
        "--stage3-override",
        "engine.policy.servers=1",
        # A busy machine needs more than the two minutes that requests wait for a pool without
        # servers.
        "--stage3-override",
        "engine.policy.pool_down_timeout_s=500",
        "--",
        *overrides,
        env={**site(tmp_path), "SBATCH_EXCLUSIVE": "exclusive", "SBATCH_TIMELIMIT": "15"},
        cwd=tmp_path,
    )
    jobs = [int(job) for job in submitted.stdout.splitlines()[-1].split()]
    slurm.until(
        lambda: rows(run / STAGE_RUN / "metrics.jsonl"),
        f"first step\n{logged(run, STAGE_RUN, 'job.log')}",
        500,
    )
    processes = slurm.run("ps", "-eo", "pid,args").stdout.splitlines()
    served = [
        line for line in processes if "server_wrapper.py server" in line and "srun" not in line
    ]
    policy = [line for line in served if "assets/generator" in line]
    slurm.run("kill", "-KILL", policy[0].split()[0])
    ended = [slurm.wait_state(job, timeout=400)["JobState"] for job in jobs]
    said = "".join(path.read_text() for path in (run / "logs/slurm").glob("*.out"))
    assert ended == ["COMPLETED"] * 4, said + logged(run, STAGE_RUN, "*.log")
    assert (
        re.search(r"server policy-node\d-0 ended", said) and "verifier servers: http://node" in said
    )
    assert len(rows(run / STAGE_RUN / "metrics.jsonl")) == 4
    assert (run / "report.html").exists()
    status = slurm.run(
        sys.executable, "-m", "spark_nemo.cli.main", "status", run, env=site(tmp_path)
    ).stdout
    assert [line.split()[1] for line in status.splitlines()[1:]] == ["done"] * 5, status
    slurm.until(lambda: not slurm.processes_of_jobs(), "end of every server", 30)
