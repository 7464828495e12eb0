"""Weights through a folder that the trainer and all servers see: a Hugging Face model per version."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

from spark_nemo.engines.base import Engine, EngineFailure
from spark_nemo.megatron.hf_files import dtype_name, write_tensors
from spark_nemo.models.hf_folder import write_model_files
from spark_nemo.utils.files import atomic_folder

from .transport import Targets, Transport, each
from .weight_stream import Export

log = logging.getLogger(__name__)


class DiskTransport(Transport):
    """Writes ``folder/version-N`` atomically, and removes older versions once all servers load it.

    ``source_dir`` holds the tokenizer and the other files that a server needs besides the tensors.
    """

    def __init__(
        self, folder: Path, hf_config: dict[str, Any], source_dir: Path | None, timeout_s: float
    ) -> None:
        self.folder = folder
        self.hf_config = hf_config
        self.source_dir = source_dir
        self.timeout_s = timeout_s

    def version_folder(self, version: int) -> Path:
        """Return the folder of ``version``."""
        return self.folder.resolve() / f"version-{version}"

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``. A full disk is an ``EngineFailure`` before any server loads."""
        target = self.version_folder(version)
        try:
            with atomic_folder(target) as temporary:
                write_model_files(
                    temporary, self.hf_config, dtype_name(export.dtype), self.source_dir
                )
                write_tensors(
                    temporary, export, export.plan.shapes, export.dtype, export.plan.bucket_bytes
                )
        except OSError as error:
            free = shutil.disk_usage(self.folder).free >> 20 if self.folder.exists() else 0
            raise EngineFailure(
                f"cannot write {target}: {error.strerror or error} ({export.plan.total_bytes >> 20} "
                f"MiB needed in addition to the version served, {free} MiB free): free disk space or "
                "set weight_sync.folder"
            ) from error
        await each(
            targets, lambda engine: self._load(engine, version), self.timeout_s, "loading from disk"
        )

    async def _load(self, engine: Engine, version: int) -> None:
        await engine.update_weights_from_disk(  # type: ignore[attr-defined]
            self.version_folder(version), version, flush_cache=False, timeout_s=self.timeout_s
        )

    async def confirmed(self, version: int) -> None:
        """Remove the other versions. Files that cannot be removed are logged and left."""
        self._remove_versions(keep=self.folder / f"version-{version}")

    async def close(self) -> None:
        """Remove the last version, too.

        The run saves its result elsewhere, and a resumed run writes a version of its own.
        """
        self._remove_versions(keep=None)
        # It fails if the folder is not empty or a mount point: then it is not ours to remove.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _remove_versions(self, keep: Path | None) -> None:
        # Other files may be the user's, who named the folder.
        for path in self.folder.glob("version-*"):
            if path != keep:
                shutil.rmtree(path, onerror=_log_not_removed)

    async def restore(self, engine: Engine, version: int) -> None:
        """See ``Transport``: the folder of the version still exists."""
        if not self.version_folder(version).is_dir():
            raise EngineFailure(f"{engine}: {self.version_folder(version)} does not exist")
        await self._load(engine, version)


def _log_not_removed(_function: object, path: str, error_info: tuple[Any, ...]) -> None:
    log.warning("cannot remove %s: %s", path, error_info[1])
