"""One process at a time works on a stage run: two that write the same checkpoints would break both.

A stage run is a shard of stage I, a reward model, an RL variant, the format SFT, or a whole
``pipeline``, which locks the run folder itself. All of them may run at the same time.

The lock is ``flock`` on the file LOCK in the stage run's folder. The kernel releases it when the
process ends, in whatever way, so nothing has to be cleaned up. The file's content only tells which
process holds it. The main rank alone takes the lock. Where a file system does not support locks, a
warning is logged.
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
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_PROBE_S = 0.2
# Descriptors of held locks. A forked child must close its copies: it would keep the lock of a
# parent that was killed.
_held: set[int] = set()


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the stage run in ``folder``; on ranks other than the main one do nothing.

    Creates the folder. Raises ``ConfigError`` that names the process which holds the lock. A
    requeued Slurm job continues in spite of a lock that its own lost node held: a network file
    system may keep that one for a while.
    """
    if not is_main_rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(file)
    taken = False
    try:
        taken = _take(file, folder)
        if taken:
            _write_owner(file)
        yield
    finally:
        if taken:
            os.ftruncate(file, 0)
        _held.discard(file)
        os.close(file)


def lock_owner(folder: Path) -> dict[str, Any] | None:
    """Return the process that holds the lock, as ``run_lock`` wrote it; None if it is free.

    Writes nothing. Raises ``OSError`` where locks are not supported. On a network file system the
    answer is as good as that system's ``flock``.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # Held for a moment only; ``_lock`` waits for it.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except (BlockingIOError, PermissionError):
        return _read_owner(file)
    finally:
        os.close(file)


def is_main_rank() -> bool:
    """Return whether this process is rank 0 by torchrun's or Slurm's environment.

    A process that was not launched as a rank is the main one.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return os.environ["RANK"] == "0"
    task = slurm_task()
    return task is None or task.rank == 0


def _take(file: int, folder: Path) -> bool:
    """Lock the file; False where the run continues without a lock."""
    try:
        _lock(file)
        return True
    except (BlockingIOError, PermissionError):  # NFS may report the latter
        owner = _read_owner(file)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        log.warning(
            "%s cannot be locked (%s): make sure that no second process runs this stage",
            folder,
            error.strerror,
        )
        return False
    job, start = _slurm_start()
    owner_job, owner_start = owner.get("slurm", (None, 0))
    if job is not None and job == owner_job and start > owner_start:
        log.warning(
            "%s is still locked by an earlier start of this Slurm job on %s: continuing",
            folder,
            owner.get("host"),
        )
        return False
    raise ConfigError(
        f"{folder} is being worked on by process {owner.get('pid', '?')} on "
        f"{owner.get('host', '?')} since {owner.get('since', '?')}; wait for it or end it, or use "
        "another run.dir"
    )


def _lock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # The holder may only be a ``lock_owner`` call, which lets go at once.
        time.sleep(_PROBE_S)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _slurm_start() -> tuple[str | None, int]:
    """Return the Slurm job and the number of times it was requeued before."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _write_owner(file: int) -> None:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv[1:],
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "slurm": _slurm_start(),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(owner).encode(), 0)
    # The file stays open while locked: without a sync NFS shows other nodes an empty file.
    os.fsync(file)


def _read_owner(file: int) -> dict[str, Any]:
    """Return the owner; empty while the other process is about to write it."""
    try:
        return json.loads(os.pread(file, 1 << 16, 0))
    except ValueError:
        return {}


def _close_copies() -> None:
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_copies)
