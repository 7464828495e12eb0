"""The trainer's end of the group that weights are broadcast in, alone in it, over gloo. What NCCL does is not shown."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron import distributed
from spark_nemo.weight_sync.distributed import _Group


@pytest.fixture
def group():
    distributed.initialize(MegatronConfig(distributed_optimizer=False))
    group = _Group([], 1, timeout_s=5.0)
    group.join()
    return group


def test_a_group_is_left_without_waiting_for_what_its_peers_never_answer(group, monkeypatch):
    """destroy_process_group waits for the broadcast that a lost server hangs (ProcessGroupNCCL::shutdown), and the run
    with it: a group is aborted, and torch has forgotten it."""
    monkeypatch.setattr(dist, "destroy_process_group", lambda *_: pytest.fail("waits for peers that may be gone"))
    made = group._group
    group.leave()
    assert group._group is None and made not in dist.distributed_c10d._world.pg_map


def test_a_hang_is_noticed_before_the_limit_at_which_nccl_ends_the_process(group):
    """``_together`` gives up after ``timeout_s``; the group's own limit is well behind it."""
    limit = group._group._get_backend(torch.device("cpu")).options._timeout
    group.leave()
    assert limit >= timedelta(seconds=1.5 * group.timeout_s)
