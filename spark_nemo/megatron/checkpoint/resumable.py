"""An output folder that appears when it is complete, and work on it that survives a kill."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError
from spark_nemo.records.jsonl import write_text_atomic

from ..hf_files import replace_folder

JOB = "job.json"


@contextlib.contextmanager
def resumable_folder(target: Path, job: dict[str, Any]) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name on success.

    After a kill, a full disk or Ctrl-C it stays and is handed out again to a ``job`` that is equal; a ``ConfigError``
    (the input is wrong) removes it. ``target`` must not exist: a ``ConfigError`` otherwise.
    """
    if target.exists():
        raise ConfigError(f"output folder {target} exists already: remove it or name another")
    partial = target.with_name(f".{target.name}.partial")
    record = partial / JOB
    if not (record.is_file() and json.loads(record.read_text()) == json.loads(json.dumps(job))):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_text_atomic(record, json.dumps(job))
    try:
        yield partial
        record.unlink()
        replace_folder(partial, target)
    except ConfigError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of a source folder: a job on other files is another job."""
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(folder.rglob("*")) if path.is_file()}
