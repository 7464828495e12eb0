"""Start the trainer ranks of one machine; under Slurm or torchrun they are there already.

Not with torch's launcher: it forwards a Ctrl-C that the ranks already had (the second one kills
them before their checkpoint), leaves them running when it is terminated itself, and reports every
status but 0 as a failure.
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
"""How long the other ranks may go on when one has ended with a status other than 0."""


def must_launch(layout: MegatronConfig) -> bool:
    """Does the layout need several ranks that nobody has started yet?"""
    return layout.world_size > 1 and "RANK" not in os.environ and slurm_task() is None


def launch_ranks(layout: MegatronConfig, arguments: Sequence[str]) -> int:
    """Run this very command once per rank on this machine; 0, or the status of the first rank that
    ended otherwise.

    SIGINT and SIGTERM are passed on as SIGTERM: the first lets the ranks write their checkpoint, a
    second kills them. A rank that fails takes the others along, which could only wait for it.
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
    status, deadline = 0, float("inf")
    while time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        if status == 0 and (ended := [code for code in codes if code]):
            # A shell's way to say "ended by a signal".
            status, deadline = (
                (ended[0] if ended[0] > 0 else 128 - ended[0]),
                time.monotonic() + _GRACE_S,
            )
        if None not in codes:
            break
        time.sleep(_POLL_S)
    return status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
