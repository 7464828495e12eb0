"""The cluster of the session. Without tests/slurm/run.sh (``make test-slurm``) only test_scripts.py
is collected.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, best_proctrack

HERE = Path(__file__).parent
collect_ignore_glob = [] if "SPARK_NEMO_SLURM" in os.environ else ["test_cluster_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the cluster as slow."""
    for item in items:
        if item.path.name.startswith("test_cluster_"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Five nodes with two pretended GPUs each, and the stand-in for a container plugin."""
    folder = Path(os.environ["SPARK_NEMO_SLURM"]) / "cluster"
    folder.mkdir()
    plugin = folder / "containers.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", plugin, HERE / "containers.c"], check=True)
    proctrack = os.environ.get("SPARK_NEMO_PROCTRACK") or best_proctrack()
    cluster = Cluster(folder, nodes=5, gpus=2, cpus=8, proctrack=proctrack, plugins=[plugin])
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def slurm(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, empty and with every node up before and after the test."""
    yield cluster
    cluster.clear()
