"""Run a function on several gloo ranks of this machine."""

import os
import socket
import time

import torch.multiprocessing as mp

PRELOADED = (
    "torch",
    "transformers",
    "spark_nemo.megatron.worker",
)
"""Imported once by the fork server; eight ranks would need half a minute."""


def run_ranks(function, world_size, *args, timeout=180):
    """Call ``function(*args)`` (of an importable module) on ``world_size`` processes; fail when one
    fails or hangs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    context = mp.start_processes(
        _rank_main,
        args=(world_size, port, function, args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + timeout
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(
                f"{function.__name__} on {world_size} ranks took more than {timeout} s"
            )


def _rank_main(rank, world_size, port, function, args):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    function(*args)
    torch.distributed.destroy_process_group()
