"""Writing a torch_dist folder from tensors that are made one at a time, and going on after a kill.

torch's own writer and metadata are used; the planner hands it each tensor when it is about to be
written.
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
"""Tensors go into one file up to this size; a larger one has a file of its own. torch's writer
holds a file's tensors.
"""
PARTS = "parts.jsonl"
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""The layout of the keys, as megatron-core records it (``content_metadata``)."""


@dataclass(frozen=True)
class Box:
    """What is written as one: a part of the tensor ``key``, whose whole shape is ``whole``."""

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
    """What to write; together the boxes of a key are the whole tensor."""

    boxes: list[Box]
    read: Callable[[int], Tensor]
    """The values of ``boxes[i]``."""
    objects: dict[str, Callable[[], bytes]]
    """Of every object that is no tensor: what makes its bytes."""


def no_extra_state() -> bytes:
    """None, as megatron-core stores the list of one rank's objects."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def write_torch_dist(
    folder: Path, source: Source, progress: Callable[[int], object], common: Path | None = None
) -> None:
    """Write the distributed checkpoint of ``source`` into ``folder``; ``common`` is the common.pt
    to go with it.

    Files that an interrupted call has finished there are kept. ``progress`` is called with the
    bytes of each box.
    """
    # The steps of torch.distributed.checkpoint.save for one process; it would hide our errors in
    # its own.
    planner, writer = _LazyPlanner(source, progress), _PartWriter(folder, progress)
    planner.set_up_planner({}, None, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan(
        [writer.prepare_local_plan(planner.create_local_plan())]
    )
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    # Checksums inside the files cost as much as the copying, and torch.load does not look at them.
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
    """A plan made of shapes. Its tensors are made when the writer asks for them."""

    def __init__(self, source: Source, progress: Callable[[int], object]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.source, self.progress = source, progress
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


class _PartWriter(FileSystemWriter):
    """torch's writer, file after file, with a record of the finished ones."""

    def __init__(self, folder: Path, progress: Callable[[int], object]) -> None:
        super().__init__(folder, thread_count=1)
        self.folder, self.progress = folder, progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        finished, results = self._finished_parts(), []
        for number, items in enumerate(_parts(plan.items)):
            if number in finished:
                done = finished[number]
                self.progress(sum(_num_bytes(item) for item in items))
            else:
                # One plan per file: what the writer calls a rank's plan.
                prefix = dataclasses.replace(plan.storage_data, prefix=f"__{number}_")
                done = self._write_part(
                    dataclasses.replace(plan, items=items, storage_data=prefix), planner
                )
                self._record(number, done)
            results += done
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_part(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        try:
            return super().write_data(plan, planner).wait()
        except RuntimeError as error:
            # Of a full disk torch's archive tells by an error of its own, raised while the system's
            # was handled.
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise

    def _record(self, number: int, results: list[WriteResult]) -> None:
        line = json.dumps(
            {
                "part": number,
                "results": [
                    [
                        r.index.fqn,
                        None if r.index.offset is None else list(r.index.offset),
                        r.storage_data.relative_path,
                        r.storage_data.offset,
                        r.storage_data.length,
                    ]
                    for r in results
                ],
            }
        )
        with (self.folder / PARTS).open("a") as stream:
            stream.write(f"\n{line}\n")  # on a line of its own, whatever a killed call has left
            stream.flush()
            os.fsync(stream.fileno())

    def _finished_parts(self) -> dict[int, list[WriteResult]]:
        """Of an interrupted call: parts whose file still has the length that was recorded."""
        path, finished = self.folder / PARTS, {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except (
                json.JSONDecodeError
            ):  # blank, or the line that was being written when the process died
                continue
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
    part, used = [], 0
    for item in items:
        num_bytes = _num_bytes(item)
        if part and used + num_bytes > FILE_BYTES:
            yield part
            part, used = [], 0
        part.append(item)
        used += num_bytes
    yield part


def _num_bytes(item: WriteItem) -> int:
    data: Any = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
