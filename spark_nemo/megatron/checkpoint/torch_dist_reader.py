"""Reading a torch_dist folder box by box, without process group or model.

Memory is bounded by the box that is read.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from spark_nemo.config.errors import ConfigError

from .safe_pickle import read_metadata

EMBEDDING = "embedding.word_embeddings.weight"
DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    MemoryError,
)
"""Errors from reading a damaged pickle or archive, in addition to the pickle module's own."""
NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state")


@dataclass(frozen=True)
class StoredTensor:
    """The entry of one tensor in ``.metadata``; ``chunks`` are the (offset, size) of its boxes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredCheckpoint:
    """The tensors of a torch_dist folder, written by any code under any layout."""

    def __init__(self, folder: str | Path) -> None:
        """Read ``metadata.json`` and ``.metadata`` only.

        Raises ``ConfigError`` naming what is missing or damaged.
        """
        self.folder = Path(folder)
        _check_format(self.folder)
        metadata = read_metadata(self.folder / ".metadata")
        self._metadata = _checked(metadata, self.folder)
        entries = self._metadata.state_dict_metadata
        self.tensors: dict[str, StoredTensor] = {
            key: StoredTensor(
                tuple(x.size),
                x.properties.dtype,
                tuple((tuple(c.offsets), tuple(c.sizes)) for c in x.chunks),
            )
            for key, x in entries.items()
            if isinstance(x, TensorStorageMetadata)
        }
        self.objects = [key for key, x in entries.items() if isinstance(x, BytesStorageMetadata)]
        self._reader = FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def prefix(self) -> str:
        """Prefix of the weights' names: "" here and in Megatron-LM, "module." in NeMo 2."""
        found = [
            key.removesuffix(EMBEDDING)
            for key in self.tensors
            if key.endswith(EMBEDDING) and not key.startswith(NOT_WEIGHTS)
        ]
        if len(found) != 1:
            raise ConfigError(
                f"{self.folder} has {len(found)} tensors named {EMBEDDING} instead of one: is it "
                "the checkpoint of a language model?"
            )
        return found[0]

    def weights(self) -> dict[str, StoredTensor]:
        """Return the model's tensors, without ``prefix`` and without the optimizer's."""
        prefix = self.prefix
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix) and not key.startswith(NOT_WEIGHTS)
        }

    def read(
        self, key: str, offset: tuple[int, ...] | None = None, size: tuple[int, ...] | None = None
    ) -> Tensor:
        """Return the box of tensor ``key`` at ``offset``; all of it by default.

        Raises ``ConfigError`` when a file is damaged.
        """
        stored = self._metadata.state_dict_metadata[key]
        offset = offset or (0,) * len(stored.size)
        size = tuple(stored.size) if size is None else size
        box = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(size))
        items = create_read_items_for_chunk_list(key, stored, [box])
        read = sum(math.prod(item.lengths) for item in items)
        if read != math.prod(size):
            raise ConfigError(
                f"{self.folder}: its files hold {read} of {math.prod(size)} values of tensor {key}"
            )
        is_stored_box = (tuple(offset), tuple(size)) in self.tensors[key].chunks
        if len(items) == 1 and is_stored_box:
            planner = _KeepBox()
        else:
            planner = _CopyInto(torch.empty(size, dtype=stored.properties.dtype))
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except (
            OSError,
            RuntimeError,
            EOFError,
            AssertionError,
            KeyError,
            ValueError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            file = self._metadata.storage_data[items[0].storage_index].relative_path
            raise ConfigError(
                f"tensor {key} in {self.folder / file} cannot be read: {_first_line(error)}"
            ) from error
        if planner.target.dtype != stored.properties.dtype:
            raise ConfigError(
                f"tensor {key} in {self.folder} is {planner.target.dtype}, .metadata says "
                f"{stored.properties.dtype}"
            )
        return planner.target

    def read_object(self, key: str) -> bytes:
        """Return the stored bytes of an object that is not a tensor, without unpickling them."""
        info = self._metadata.storage_data.get(MetadataIndex(key))
        if info is None:
            raise ConfigError(f"{self.folder / '.metadata'}: no file holds {key}")
        with (self.folder / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            return stream.read(info.length)

    def common(self) -> dict[str, Any]:
        """Return common.pt (step, optimizer settings), read without running code from it."""
        path = self.folder / "common.pt"
        try:
            common = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path} is missing: this is not a complete torch_dist checkpoint"
            ) from error
        # torch does not document the errors of a damaged file; flipped bytes have raised these.
        except (*DAMAGE, pickle.UnpicklingError, struct.error) as error:
            raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from error
        if not isinstance(common, dict):
            raise ConfigError(f"{path} holds a {type(common).__name__}, not named values")
        return common


class _CopyInto(LoadPlanner):
    """Copy the parts that are read into one tensor, which is a box of the stored one."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            box = box.narrow(dim, start, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


class _KeepBox(_CopyInto):
    """Keep a box as it was read: no copy, and no second tensor of its size.

    The reader calls three methods of the tensor it is given. This class has them and keeps the
    values.
    """

    def __init__(self) -> None:
        self.target = None
        self._size = None

    def resolve_tensor(self, read_item: ReadItem) -> Any:
        self._size = read_item.lengths
        return self

    def detach(self) -> Any:
        return self

    def size(self) -> torch.Size:
        return torch.Size(self._size)

    def copy_(self, values: Tensor) -> None:
        self.target = values


def _check_format(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"checkpoint folder {folder} does not exist")
    path = folder / "metadata.json"
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} has no metadata.json: it is not a Megatron distributed checkpoint"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    if backend != "torch_dist":
        raise ConfigError(
            f"{path}: sharded_backend={backend!r} is not supported, only 'torch_dist'"
        )


def _checked(metadata: Any, folder: Path) -> Metadata:
    """Return ``metadata`` if it is valid, else raise ``ConfigError``.

    Its files must be in ``folder``, and its boxes must cover every tensor.
    """
    path = folder / ".metadata"
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path} holds no checkpoint metadata")
    try:
        _check_files(metadata.storage_data, folder)
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                _check_boxes(key, entry, metadata.storage_data, path)
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{path} holds no checkpoint metadata: {_first_line(error)}") from error
    return metadata


def _check_files(storage_data: dict[MetadataIndex, Any], folder: Path) -> None:
    sizes: dict[str, int] = {}
    for index, info in storage_data.items():
        name = info.relative_path
        if Path(name).name != name:
            raise ConfigError(
                f"{folder / '.metadata'}: {index.fqn} points to {name!r}, outside the checkpoint"
            )
        if name not in sizes:
            path = folder / name
            if not path.is_file():
                raise ConfigError(
                    f"{path} is missing, though {folder / '.metadata'} names it for {index.fqn}"
                )
            sizes[name] = path.stat().st_size
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise ConfigError(
                f"{folder / name} is truncated: {index.fqn} ends at byte "
                f"{info.offset + info.length}, the file has {sizes[name]}"
            )


def _check_boxes(
    key: str, entry: TensorStorageMetadata, storage_data: dict[MetadataIndex, Any], path: Path
) -> None:
    size = tuple(entry.size)
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    for chunk, (offset, lengths) in zip(entry.chunks, boxes):
        if MetadataIndex(key, chunk.offsets) not in storage_data:
            raise ConfigError(f"{path}: no file holds tensor {key} at {offset}")
        if not len(offset) == len(lengths) == len(size) or not all(
            0 <= start <= start + length <= end for start, length, end in zip(offset, lengths, size)
        ):
            raise ConfigError(
                f"{path}: box {lengths} of tensor {key} at {offset} is not inside its shape {size}"
            )
    if not _tile(boxes, size):
        raise ConfigError(f"{path}: the files do not hold all of tensor {key} exactly once")


def _tile(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], size: tuple[int, ...], axis: int = 0
) -> bool:
    """True if boxes ``(offset, size)`` inside ``size`` fill it without gap or overlap.

    A sum of their volumes is not enough: an overlap would make up for a gap, and the gap would be
    read as uninitialised memory.
    """
    if axis == len(size):
        return len(boxes) == 1
    cuts = sorted({0, size[axis]}.union(*({o[axis], o[axis] + n[axis]} for o, n in boxes)))
    slab_at = {cut: number for number, cut in enumerate(cuts)}
    slabs: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = [[] for _ in cuts[1:]]
    for box in boxes:
        for number in range(slab_at[box[0][axis]], slab_at[box[0][axis] + box[1][axis]]):
            slabs[number].append(box)
    return all(_tile(slab, size, axis + 1) for slab in slabs)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
