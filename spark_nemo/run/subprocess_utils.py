"""Child processes that end with their parent: a killed run must not write on after it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

_PARENT = "SPARK_NEMO_PARENT"
_PR_SET_PDEATHSIG = 1


def start_child(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``spark-nemo`` with ``arguments``; ``output`` takes its stdout and stderr.

    The child has a session of its own, so that Ctrl-C reaches the parent alone.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "spark_nemo.cli.main", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env={**os.environ, **(environment or {}), _PARENT: str(os.getpid())},
    )


def die_with_parent() -> None:
    """Have the kernel kill this child of ``start_child`` when its parent dies (Linux only).

    With SIGKILL: a checkpoint written now could collide with the run that replaced the parent's.
    """
    parent = os.environ.pop(_PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the call above.
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
