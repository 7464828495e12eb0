"""Start the trainer ranks of one machine; under Slurm or torchrun they are running already.

torch's launcher is not used. It forwards a Ctrl-C that the ranks already received, and the second
one kills them before their checkpoint. It leaves them running when it is terminated itself, and
reports every status but 0 as a failure.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from spark_nemo.config import MegatronConfig
from spark_nemo.run.subprocess_utils import start_child
from spark_nemo.utils.slurm import slurm_task

_POLL_S = 0.1
_GRACE_S = 20.0
"""Seconds that the other ranks may go on after one ended with a status other than 0."""


def must_launch(layout: MegatronConfig) -> bool:
    """Return whether the layout needs several ranks and no launcher has started them."""
    return layout.world_size > 1 and "RANK" not in os.environ and slurm_task() is None


def launch_ranks(layout: MegatronConfig, arguments: Sequence[str]) -> int:
    """Run this command once per rank; return 0, or the status of the first rank that failed.

    SIGINT and SIGTERM are passed on as SIGTERM: the first lets the ranks write their checkpoint, a
    second kills them. A rank that fails ends the others, which could only wait for it.
    """
    shared = {
        "WORLD_SIZE": str(layout.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(*_: object) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    previous = {
        number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for number in range(layout.world_size):
            ranks.append(
                start_child(arguments, {**shared, "RANK": str(number), "LOCAL_RANK": str(number)})
            )
        return _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    status = 0
    deadline = float("inf")
    while time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed and status == 0:
            # As a shell reports a process that a signal ended.
            status = failed[0] if failed[0] > 0 else 128 - failed[0]
            deadline = time.monotonic() + _GRACE_S
        if None not in codes:
            break
        time.sleep(_POLL_S)
    return status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
