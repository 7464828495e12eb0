"""Writing a torch_dist folder from tensors that are made one at a time; resumes after a kill.

It uses torch's writer and metadata; the planner makes each tensor when the writer is about to write
it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization_config

FILE_BYTES = 512 << 20
"""Size of a file; a larger tensor has its own. torch's writer holds a file's tensors in memory."""
PARTS = "parts.jsonl"
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""The layout of the keys, as megatron-core records it (``content_metadata``)."""


@dataclass(frozen=True)
class Box:
    """A part of the tensor ``key``, written at once; the tensor's whole shape is ``whole``."""

    key: str
    whole: tuple[int, ...]
    dtype: torch.dtype
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """Contents to write; the boxes of a key together are the whole tensor."""

    boxes: list[Box]
    read: Callable[[int], Tensor]
    """Return the values of ``boxes[i]``."""
    objects: dict[str, Callable[[], bytes]]
    """Functions that return the bytes of the objects that are not tensors."""


def no_extra_state() -> bytes:
    """Return the stored form of None: megatron-core stores a list with one rank's object."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def write_torch_dist(
    folder: Path, source: Source, progress: Callable[[int], object], common: Path | None = None
) -> None:
    """Write ``source`` into ``folder``; ``common`` is the common.pt to copy into it.

    Keeps the files that an interrupted call has finished. Calls ``progress`` with the bytes of each
    box.
    """
    # These are the steps of torch.distributed.checkpoint.save for one process, which would wrap
    # every error in its own.
    planner = _LazyPlanner(source, progress)
    writer = PartWriter(folder, progress)
    planner.set_up_planner({}, None, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan(
        [writer.prepare_local_plan(planner.create_local_plan())]
    )
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    # Checksums inside the files cost as much as the copying, and torch.load does not check them.
    with serialization_config.patch({"save.compute_crc32": False}):
        results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    if common is None:
        torch.save({"content_metadata": CONTENT}, folder / "common.pt")
    else:
        shutil.copyfile(common, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    (folder / PARTS).unlink()


class _LazyPlanner(DefaultSavePlanner):
    """A plan made of shapes; each tensor is made when the writer resolves it."""

    def __init__(self, source: Source, progress: Callable[[int], object]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.source = source
        self.progress = progress
        self.number = {(box.key, box.offset): n for n, box in enumerate(source.boxes)}

    def create_local_plan(self) -> SavePlan:
        items = [_tensor_item(box) for box in self.source.boxes]
        items += [
            WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.source.objects
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self.source.objects[write_item.index.fqn]())
        number = self.number[write_item.index.fqn, tuple(write_item.index.offset)]
        box = self.source.boxes[number]
        tensor = self.source.read(number).to(box.dtype).contiguous().reshape(box.size)
        self.progress(tensor.nbytes)
        return tensor


def _tensor_item(box: Box) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size))
    return WriteItem(
        MetadataIndex(box.key, box.offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk, TensorProperties(dtype=box.dtype), torch.Size(box.whole)
        ),
    )


class PartWriter(FileSystemWriter):
    """torch's writer, one file after the other, with a record of the finished files."""

    def __init__(self, folder: Path, progress: Callable[[int], object]) -> None:
        super().__init__(folder, thread_count=1)
        self.folder = folder
        self.progress = progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        finished = self.finished_parts()
        results = []
        for number, items in enumerate(_parts(plan.items)):
            if number in finished:
                done = finished[number]
                self.progress(sum(_num_bytes(item) for item in items))
            else:
                # One plan per file, which the writer takes for a rank's plan.
                prefix = dataclasses.replace(plan.storage_data, prefix=f"__{number}_")
                done = self._write_part(
                    dataclasses.replace(plan, items=items, storage_data=prefix), planner
                )
                self.record(number, done)
            results += done
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_part(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        try:
            return super().write_data(plan, planner).wait()
        except RuntimeError as error:
            # torch's archive reports a full disk with its own error, raised while it handles the
            # system's.
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise

    def record(self, number: int, results: list[WriteResult]) -> None:
        """Append one finished file to the record, on disk before the next file starts."""
        rows = [
            [
                result.index.fqn,
                None if result.index.offset is None else list(result.index.offset),
                result.storage_data.relative_path,
                result.storage_data.offset,
                result.storage_data.length,
            ]
            for result in results
        ]
        line = json.dumps({"part": number, "results": rows})
        with (self.folder / PARTS).open("a") as stream:
            stream.write(f"\n{line}\n")  # starts a new line after a half-written one
            stream.flush()
            os.fsync(stream.fileno())

    def finished_parts(self) -> dict[int, list[WriteResult]]:
        """Return the parts of an interrupted call whose file still has the recorded length."""
        path = self.folder / PARTS
        if not path.exists():
            return {}
        finished = {}
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # blank, or half-written when the process died
            results = [
                WriteResult(MetadataIndex(key, offset), length, _StorageInfo(file, start, length))
                for key, offset, file, start, length in record["results"]
            ]
            file = self.folder / results[0].storage_data.relative_path
            end = max(r.storage_data.offset + r.storage_data.length for r in results)
            if file.is_file() and file.stat().st_size == end:
                finished[record["part"]] = results
        return finished


def _parts(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Yield the items of each file, in order."""
    part: list[WriteItem] = []
    used = 0
    for item in items:
        num_bytes = _num_bytes(item)
        if part and used + num_bytes > FILE_BYTES:
            yield part
            part = []
            used = 0
        part.append(item)
        used += num_bytes
    yield part


def _num_bytes(item: WriteItem) -> int:
    data: Any = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
