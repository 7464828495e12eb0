"""Weights through a folder that the trainer and all servers see: one complete Hugging Face model
per version.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from spark_nemo.engines.base import Engine, EngineFailure
from spark_nemo.engines.local.checksum import raw_bytes
from spark_nemo.megatron.hf_files import INDEX, atomic_folder, write_model_files

from .sync_plan import SyncPlan, TensorPlan
from .transport import Targets, Transport, each
from .weight_stream import Export

log = logging.getLogger(__name__)

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class DiskTransport(Transport):
    """``folder/version-N`` appears whole or not at all; older versions go when every server has the
    new one.

    ``source_dir`` gives the tokenizer and the other files a server may want beside the tensors.
    """

    def __init__(
        self, folder: Path, hf_config: dict[str, Any], source_dir: Path | None, timeout_s: float
    ) -> None:
        self.folder, self.hf_config, self.source_dir, self.timeout_s = (
            folder,
            hf_config,
            source_dir,
            timeout_s,
        )

    def version_folder(self, version: int) -> Path:
        """Where ``version`` lies."""
        return self.folder.resolve() / f"version-{version}"

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``. A full disk is one ``EngineFailure``, before any server was asked to
        load.
        """
        target = self.version_folder(version)
        try:
            with atomic_folder(target) as temporary:
                write_model_files(temporary, self.hf_config, export.dtype, self.source_dir)
                write_safetensors(temporary, export)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free >> 20 if self.folder.exists() else 0
            raise EngineFailure(
                f"cannot write {target}: {error.strerror or error} ({export.plan.total_bytes >> 20} MiB needed beside "
                f"the version served, {free} MiB free): make room or set weight_sync.folder"
            ) from error
        await each(
            targets, lambda engine: self._load(engine, version), self.timeout_s, "loading from disk"
        )

    async def _load(self, engine: Engine, version: int) -> None:
        await engine.update_weights_from_disk(  # type: ignore[attr-defined]
            self.version_folder(version), version, flush_cache=False, timeout_s=self.timeout_s
        )

    async def confirmed(self, version: int) -> None:
        """Remove the other versions. What cannot be removed is said and left."""
        self._remove(keep=self.folder / f"version-{version}")

    async def close(self) -> None:
        """Remove the last version, too: the run's result is saved elsewhere, and a resumed run
        writes its own.
        """
        self._remove(keep=None)
        with contextlib.suppress(
            OSError
        ):  # not empty, or a mount point: then it is not ours to remove
            self.folder.rmdir()

    def _remove(self, keep: Path | None) -> None:
        """Every version but ``keep``; nothing else that may lie in a folder the user named."""
        for path in self.folder.glob("version-*"):
            if path != keep:
                shutil.rmtree(
                    path,
                    onerror=lambda _, name, info: log.warning(
                        "cannot remove %s: %s", name, info[1]
                    ),
                )

    async def restore(self, engine: Engine, version: int) -> None:
        """See ``Transport``: the version is still there."""
        if not self.version_folder(version).is_dir():
            raise EngineFailure(f"{engine}: {self.version_folder(version)} does not exist")
        await self._load(engine, version)


def write_safetensors(folder: Path, export: Export) -> None:
    """Write a file per bucket, tensor by tensor: no more than one tensor is in memory. Raises
    ``OSError``.

    The format is 8 bytes of header length, a JSON header, the tensors' bytes
    (github.com/huggingface/safetensors). Its own writer takes a file's tensors all at once, and a
    full disk may end it with a signal.
    """
    tensors = iter(export)
    files = list(_files(export.plan))
    for name, planned in files:
        with (folder / name).open("wb") as file:
            file.write(_header(planned, export.dtype))
            for _ in planned:
                _, tensor = next(tensors)
                file.write(raw_bytes(tensor))
                del tensor  # not beside the next one
            file.flush()
            os.fsync(file.fileno())
    next(tensors, None)
    if len(files) > 1:
        weight_map = {tensor.name: name for name, planned in files for tensor in planned}
        total = {"total_size": export.plan.total_bytes}
        (folder / INDEX).write_text(
            json.dumps({"metadata": total, "weight_map": weight_map}, indent=2)
        )


def _files(plan: SyncPlan) -> Iterator[tuple[str, list[TensorPlan]]]:
    """A file per bucket."""
    count, tensors = len(plan.buckets), {tensor.name: tensor for tensor in plan.tensors}
    for number, names in enumerate(plan.buckets, start=1):
        file = (
            "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        )
        yield file, [tensors[name] for name in names]


def _header(planned: list[TensorPlan], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in planned:
        stop = start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _DTYPES[dtype],
            "shape": tensor.shape,
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return struct.pack("<Q", len(text)) + text
