"""The test cluster itself."""

from __future__ import annotations

from cluster import Cluster


def test_five_real_nodes_and_the_process_tracking_of_production(slurm: Cluster) -> None:
    """Every node is its own host to the programs on it, and processes are tracked with cgroups where that is possible
    (root and a freezer hierarchy): only then does a signal reach the step's tasks alone, as on production clusters.
    """
    hosts = slurm.run("srun", "--nodes=5", "--ntasks=5", "hostname").stdout.split()
    assert sorted(hosts) == slurm.names
    assert f"proctrack/{slurm.proctrack}" in slurm.run("scontrol", "show", "config").stdout
