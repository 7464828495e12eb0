"""An output folder that appears when complete, and whose writing resumes after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError
from spark_nemo.utils.files import replace_folder, write_text_atomic

logger = logging.getLogger(__name__)

JOB = "job.json"


@contextlib.contextmanager
def resumable_folder(target: Path, job: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder next to ``target`` that is renamed to ``target`` on success.

    After a kill, a full disk or Ctrl-C the folder stays, for a later call with an equal ``job``; a
    ``ConfigError`` in the block (wrong input) removes it. Raises ``ConfigError`` when ``target``
    exists or another process is writing it.
    """
    # is_symlink: a dangling link could not be replaced at the end.
    if target.exists() or target.is_symlink():
        raise ConfigError(f"output folder {target} exists already: remove it or choose another")
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, target):
        record = partial / JOB
        as_json = json.loads(json.dumps(job))
        if not record.is_file() or json.loads(record.read_text()) != as_json:
            _clear(partial)  # what another job has written
            write_text_atomic(record, json.dumps(job))
        try:
            yield partial
            record.unlink()
            replace_folder(partial, target)
        except ConfigError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases when the process ends.

    Two processes that write the same files would truncate each other's, and the first to finish
    would publish files that the other has not finished.
    """
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, target)
        # Another process may have finished between opening and locking: then this handle is its
        # folder, renamed to the target.
        if target.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise ConfigError(f"output folder {target} was just made by another process")
        yield
    finally:
        os.close(handle)


def _lock(handle: int, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"output folder {target} is being made by another process: wait for it, or stop it and "
            "run this command again"
        ) from error
    except OSError as error:  # some cluster file systems do not support locks
        logger.warning(
            "%s: not locked (%s); do not let a second process write it", target, error.strerror
        )


def folder_fingerprint(folder: Path) -> dict[str, list[int]]:
    """Return size and modification time of every file: a job on other files is another job."""
    return {
        str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
