"""Child processes that do not outlive their parent: a killed run must not write on behind the back
of the next one.
"""

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
    """``spark-nemo`` with ``arguments`` in a session of its own, so that Ctrl-C reaches the parent
    alone.

    ``output`` takes stdout and stderr; None leaves them where the parent's go.
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
    """In a child of ``start_child``: have the kernel kill this process when its parent dies (on
    Linux). Else nothing.

    SIGKILL, because a checkpoint written now could meet the run that was started in place of the
    parent's.
    """
    parent = os.environ.pop(_PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was dead before we asked
        os.kill(os.getpid(), signal.SIGKILL)
