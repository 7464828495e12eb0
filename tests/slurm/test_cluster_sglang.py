"""Stage III with real SGLang servers in steps of their own; opt-in, for the servers need half a minute to start and an
environment of their own (``make test-sglang`` builds it; name its Python in $SPARK_SGLANG_PYTHON).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_world import RL, logged, output, rows, submit

pytestmark = pytest.mark.skipif("SPARK_SGLANG_PYTHON" not in os.environ, reason="$SPARK_SGLANG_PYTHON is not set")


@pytest.mark.timeout(900)
def test_trainer_on_two_nodes_and_servers_on_two_others(slurm: Cluster, tmp_path: Path) -> None:
    """Two trainer ranks over gloo, a policy server that takes their weights, a verifier server that rewards: two steps
    end with DONE and the addresses in the log. SGLang 0.5.21 on a CPU with a torch stand-in for its kernels.
    """
    run = tmp_path / "run"
    overrides = [*RL, "rl.steps=2", "+engine=sglang_cpu", "engine.policy.servers=1", f"run.dir={run}"]
    job = submit(slurm, tmp_path, "stage3_rl.sh", "--policy-nodes", 1, "--verifier-nodes", 1, overrides=overrides,
                 options=("--nodes=4",))
    ended = slurm.wait_state(job, timeout=840)
    said = output(tmp_path, job) + logged(run, "stage3/process_aware", "*.log")
    assert ended["JobState"] == "COMPLETED", said
    assert "policy servers: http://node2:" in said and "verifier servers: http://node3:" in said
    assert len(rows(run / "stage3/process_aware/metrics.jsonl")) == 2
    slurm.until(lambda: not slurm.processes_of_jobs(), "end of every server", 30)
