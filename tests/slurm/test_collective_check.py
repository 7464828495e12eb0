"""Result of the collective test when a node ends in the middle; real exchanges need nodes."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[2] / "slurm"))
import collective_check


def test_a_node_that_never_tells_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL may take the process of a broken exchange down before it says how fast it was: its
    node's name is known from before, and is what --exclude takes.
    """
    monkeypatch.setattr(collective_check, "WAIT", datetime.timedelta(seconds=0.05))
    store = dist.HashStore()
    for rank, node in enumerate(("gpu1", "gpu2", "gpu3")):
        store.set(f"name/{rank}", node)
    store.set("node/0", "gpu1 0.5 0.0")
    store.set("node/2", "gpu3 0.6 0.0")
    found = [collective_check.collect(store, rank) for rank in range(3)]
    assert collective_check.judge(found) == {"gpu2"}
