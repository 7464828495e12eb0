"""The test cluster itself."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster
from slurm_world import REPO, site


def test_five_real_nodes_and_the_process_tracking_of_production(slurm: Cluster) -> None:
    """Every node is its own host to the programs on it, and processes are tracked with cgroups
    where that is possible (root and a freezer hierarchy): only then does a signal reach the step's
    tasks alone, as on production clusters.
    """
    hosts = slurm.run("srun", "--nodes=5", "--ntasks=5", "hostname").stdout.split()
    assert sorted(hosts) == slurm.names
    assert f"proctrack/{slurm.proctrack}" in slurm.run("scontrol", "show", "config").stdout


RANKS_JOB = """#!/bin/bash
SLURM_DIR={repo}/slurm
source "$SLURM_DIR/lib.sh"
load_site
LOG_DIR={folder} RUN_DIR={folder}
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
start_step trainer "$(join_by , "${{NODES[@]}}")" 4 trainer -c '
import os, socket
from spark_nemo.utils.slurm import slurm_task
task = slurm_task()
print(task.rank, task.world_size, task.master_address, task.master_port, socket.gethostname(),
      os.environ["SLURM_LOCALID"], os.environ["CUDA_VISIBLE_DEVICES"])'
wait_for "$STEP_PID"
"""


def test_ranks_know_their_place_and_see_their_nodes_gpus(slurm: Cluster, tmp_path: Path) -> None:
    """Four ranks on two nodes, from Slurm's environment alone: rank and local rank follow the
    nodes, all agree where to meet, each sees both (pretended) GPUs of its node. One log file per
    rank.
    """
    script = tmp_path / "ranks.sh"
    script.write_text(RANKS_JOB.format(repo=REPO, folder=tmp_path))
    job = slurm.sbatch(
        "--nodes=2", "--exclusive", "--gpus-per-node=2", script, env=site(tmp_path), cwd=tmp_path
    )
    assert slurm.wait_state(job)["JobState"] == "COMPLETED"
    ranks = [(tmp_path / f"trainer-{rank}.log").read_text().split() for rank in range(4)]
    first, second = slurm.run(
        "scontrol", "show", "hostnames", slurm.job(job)["NodeList"]
    ).stdout.split()
    port = ranks[0][3]
    assert ranks == [
        [str(rank), "4", first, port, host, local, "0,1"]
        for rank, (host, local) in enumerate(
            [(first, "0"), (first, "1"), (second, "0"), (second, "1")]
        )
    ]
