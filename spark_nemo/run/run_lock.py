"""One process at a time works on a part of a run: two that wrote the same checkpoints would spoil
both.

The lock is ``flock`` on the file LOCK in the part's folder. The kernel lets go of it when the
process ends, however it ends, so nothing has to be cleaned up; what is written in the file only
tells who has it. A part is a shard of stage I, a reward model, an arm, the format SFT, or a whole
``pipeline``, which holds the run folder itself; all of them may run side by side. Only the main
rank of a part takes its lock. Where a file system has no locks, a warning says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from spark_nemo.config import ConfigError
from spark_nemo.utils.slurm import slurm_task

log = logging.getLogger(__name__)
LOCK = "LOCK"
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_GLANCE_S = 0.2
_held: set[int] = set()
"""File descriptors; a forked child must close its copies, or it would keep the lock of a parent
that was killed.
"""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the part in ``folder``, which is made; on ranks other than the main one do nothing.

    Raises ``ConfigError`` that names the process which has it. A Slurm job that was requeued goes
    on in spite of the lock of its own lost node, which a network file system may keep for a while.
    """
    if not is_main_rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(file)
    taken = False
    try:
        if taken := _take(file, folder):
            _write(
                file,
                {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "command": sys.argv[1:],
                    "since": datetime.now().astimezone().isoformat(" ", "seconds"),
                    "slurm": _slurm_start(),
                },
            )
        yield
    finally:
        if taken:
            os.ftruncate(file, 0)
        _held.discard(file)
        os.close(file)


def lock_owner(folder: Path) -> dict[str, Any] | None:
    """Who works on the part in ``folder``, as ``run_lock`` wrote it; None for nobody. Writes
    nothing.

    Raises ``OSError`` where there are no locks to ask. Who has the lock of a network file system
    may be out of sight on another node: as good as that file system's ``flock``.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment, which _lock waits for
        return None
    except (BlockingIOError, PermissionError):
        return _owner(file)
    finally:
        os.close(file)


def _take(file: int, folder: Path) -> bool:
    try:
        _lock(file)
        return True
    except (BlockingIOError, PermissionError):  # NFS may say the latter
        owner = _owner(file)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "%s cannot be locked (%s): take care that no second run works on it",
            folder,
            error.strerror,
        )
        return False
    (job, start), (its_job, its_start) = _slurm_start(), owner.get("slurm", (None, 0))
    if job is not None and job == its_job and start > its_start:
        log.warning(
            "%s is still locked by an earlier start of this job on %s: going on",
            folder,
            owner.get("host"),
        )
        return False
    raise ConfigError(
        f"{folder} is being worked on by process {owner.get('pid', '?')} on {owner.get('host', '?')} since "
        f"{owner.get('since', '?')}: wait for it or end it, or use another run.dir"
    )


def _lock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_GLANCE_S)  # it may only have been lock_owner's
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_main_rank() -> bool:
    """By what the launcher (torchrun, srun) says; a process that nobody launched as a rank is the
    only one.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return os.environ["RANK"] == "0"
    task = slurm_task()
    return task is None or task.rank == 0


def _slurm_start() -> tuple[str | None, int]:
    """The Slurm job, and how often it was requeued before."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _write(file: int, owner: dict[str, object]) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(owner).encode(), 0)
    os.fsync(file)  # it stays open: NFS would show other nodes an empty file until it is closed


def _owner(file: int) -> dict[str, Any]:
    """Empty while the other process is about to write it."""
    try:
        return json.loads(os.pread(file, 1 << 16, 0))
    except ValueError:
        return {}


def _close_copies() -> None:
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_copies)
