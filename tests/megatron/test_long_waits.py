"""Timeouts of ranks that wait for each other, on two gloo ranks of this machine."""

import json
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron_ranks import run_ranks

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron import process_groups

LIMIT_S = 1.0


def waiting_ranks(store):
    """Rank 0 works for longer than the default group's limit before each word to the other."""
    process_groups.initialize(MegatronConfig(data_parallel=2, distributed_optimizer=False))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT_S), dist.group.WORLD)

    def work():
        time.sleep(3 * LIMIT_S)
        return "done"

    heard = process_groups.gather_objects(process_groups.on_main_rank(work))
    if process_groups.rank() == 0:
        time.sleep(3 * LIMIT_S)
    try:
        dist.broadcast_object_list([None])
        ended = False
    except RuntimeError as error:
        ended = "imed out" in str(error)
    (store / f"{process_groups.rank()}.json").write_text(json.dumps([heard, ended]))


@pytest.mark.slow
def test_ranks_wait_for_the_main_rank_longer_than_torch_lets_a_collective_call_wait(tmp_path):
    """The main rank generates for hours while torch would end a wait in the default group after 10
    minutes over NCCL and 30 over gloo. With that limit at one second the others still hear of what
    took three; in the default group the same wait is ended. NCCL itself does not run here.
    """
    run_ranks(waiting_ranks, 2, tmp_path)
    heard, ended = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)))
    assert list(heard) == [["done", "done"]] * 2
    assert ended[1], "the limit of the default group is not in force: the test proves nothing"


def test_the_default_group_waits_for_the_writers_of_a_checkpoint():
    """Megatron-core ends a checkpoint with a barrier in the default group. Its limit is hours, not
    NCCL's 10 minutes; that NCCL takes the limit from the same call is torch's word.
    """
    process_groups.initialize(MegatronConfig(distributed_optimizer=False))
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout == process_groups.DEFAULT_GROUP_TIMEOUT > timedelta(hours=1)
