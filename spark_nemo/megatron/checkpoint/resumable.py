"""An output folder that appears when it is complete, and work on it that survives a kill."""

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
from spark_nemo.models.hf_folder import replace_folder
from spark_nemo.utils.files import write_text_atomic

logger = logging.getLogger(__name__)

JOB = "job.json"


@contextlib.contextmanager
def resumable_folder(target: Path, job: dict[str, Any]) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name on success.

    After a kill, a full disk or Ctrl-C it stays and is handed out again to a ``job`` that is equal;
    a ``ConfigError`` (the input is wrong) removes it. ``target`` must not exist, and nobody else
    may be making it: a ``ConfigError`` otherwise.
    """
    if target.exists() or target.is_symlink():  # a link to nothing could not be replaced at the end
        raise ConfigError(f"output folder {target} exists already: remove it or name another")
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _held(partial, target):
        record = partial / JOB
        if not (record.is_file() and json.loads(record.read_text()) == json.loads(json.dumps(job))):
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_text_atomic(record, json.dumps(job))
        try:
            yield partial
            record.unlink()
            replace_folder(partial, target)
        except ConfigError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _held(partial: Path, target: Path) -> Iterator[None]:
    """The folder's lock, which the kernel lets go of when the process ends. Two that write the same
    files would cut each other's short, and the first to finish would publish what the other has not
    written yet.
    """
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, target)
        # The one before may have finished between the opening and the lock: then this is its
        # folder, renamed.
        if target.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise ConfigError(f"output folder {target} has just been made by another process")
        yield
    finally:
        os.close(handle)


def _lock(handle: int, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"output folder {target} is being made by another process: wait for it, or stop it and run "
            "this again"
        ) from error
    except OSError as error:  # some cluster file systems have no locks
        logger.warning(
            "%s: not locked (%s): let no second process write it", target, error.strerror
        )


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of a source folder: a job on other files is another job."""
    return {
        str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
