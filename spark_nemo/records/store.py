"""An append-only store of JSON records in a folder of shard files.

A record is one line: CRC-32 of what follows the tab as 8 hex digits, a tab, then ASCII JSON with key, kind and payload.
Every writer appends to a fresh shard of its own, so writers need no locks and nobody ever appends to a torn line.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from itertools import count, groupby
from pathlib import Path

from .jsonl import fsync_directory

logger = logging.getLogger(__name__)

_SUFFIX = ".records"
_WRITER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# The usual beginning of a record, from which key and kind are read without parsing the payload.
_HEAD = re.compile(rb'\{"key": "([^"\\]+)", "kind": "([^"\\]+)", "payload": \{')
_OFFSET_BITS = 44
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StoreFull(RuntimeError):
    """The disk, quota or file size limit has no room for a record. Everything acknowledged before is intact."""


class RecordStore:
    """Records by key in one folder. Use it from one thread; any number of processes may have the folder open.

    ``writer_name`` names this process's shards; without it the store is read-only and the folder must exist. A key
    names one record of its kind: appending it again does nothing, and when two writers wrote it, the one read first
    (shards in order of their names) counts. ``append`` returns once the record is on disk, or with ``fsync_every=n``
    once every n-th one is; ``flush``, also done on closing, settles the rest. Memory holds keys and offsets only.

    Raises ``ValueError`` on a bad name, payload or a read-only append, ``StoreFull`` when there is no room.
    """

    def __init__(self, folder: str | Path, writer_name: str | None = None, *, fsync_every: int = 1) -> None:
        if writer_name is not None and not _WRITER_NAME.fullmatch(writer_name):
            raise ValueError(f"RecordStore writer_name={writer_name!r}: use letters, digits, '.', '_' and '-'")
        if fsync_every < 1:
            raise ValueError(f"RecordStore fsync_every={fsync_every}: must be at least 1")
        self.folder = Path(folder)
        self.corrupt_records = 0
        """Lines met so far that fail their checksum; each was logged with file and byte offset, and skipped."""
        self.torn_tails = 0
        """Shards that ended in an unfinished line at the last refresh: a killed writer's unacknowledged record."""
        self._writer_name = writer_name
        self._fsync_every = fsync_every
        self._index: dict[str, dict[str, int]] = {}
        self._shards: list[Path] = []
        self._scanned: dict[Path, int] = {}
        self._writer: _ShardWriter | None = None
        self._own_shard = -1
        self._unsettled: list[tuple[str, str]] = []
        if writer_name is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_directory(self.folder.parent)
        elif not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no record store there: check the path or run the stage before")
        self.refresh()

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def refresh(self) -> None:
        """Take in what other writers have added since the last look."""
        known = {path: shard for shard, path in enumerate(self._shards)}
        self.torn_tails = 0
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path not in known:
                known[path] = self._add_shard(path)
            self._scan(path, known[path])

    def append(self, key: str, kind: str, payload: dict[str, object]) -> bool:
        """Write one record; False, and nothing is written, when this key of this kind is there already."""
        if self._writer_name is None:
            raise ValueError(f"{self.folder}: opened without a writer_name, so for reading only")
        if not key or not kind or not isinstance(payload, dict):
            raise ValueError(f"{self.folder}: record {key!r}: key and kind must not be empty, the payload a dict")
        if key in self._index.get(kind, {}):
            return False
        body = json.dumps({"key": key, "kind": kind, "payload": payload}, allow_nan=False).encode("ascii")
        line = b"%08x\t%s\n" % (zlib.crc32(body), body)
        try:
            if self._writer is None:
                self._writer = _ShardWriter(self.folder, self._writer_name)
                self._own_shard = self._add_shard(self._writer.path)
            offset = self._writer.write(line)
        except OSError as error:
            self._abandon_unless_clean()
            raise self._named(error, f"writing a record of {len(line)} bytes") from error
        self._index.setdefault(kind, {})[key] = self._own_shard << _OFFSET_BITS | offset
        self._scanned[self._writer.path] = self._writer.end
        self._unsettled.append((kind, key))
        if len(self._unsettled) >= self._fsync_every:
            self.flush()
        return True

    def flush(self) -> None:
        """Put every appended record on disk. When that fails, those not yet settled count as never appended."""
        if self._writer is None or not self._unsettled:
            return
        try:
            os.fsync(self._writer.handle)
        except OSError as error:
            # After a failed fsync the kernel may have dropped the pages: only a new file can be trusted.
            for kind, key in self._unsettled:
                self._index[kind].pop(key, None)
            lost, self._unsettled = len(self._unsettled), []
            self._writer.clean = False
            self._abandon_unless_clean()
            raise self._named(error, f"syncing {lost} records, which are taken back") from error
        self._unsettled = []

    def close(self) -> None:
        """Flush and let go of the shard."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                os.close(self._writer.handle)
                self._writer = None

    def keys(self, kind: str) -> set[str]:
        """Keys of the records of a kind, as of opening, the last refresh and this store's own appends."""
        return set(self._index.get(kind, {}))

    def iter(self, kind: str) -> Iterator[tuple[str, dict[str, object]]]:
        """Stream ``(key, payload)``, each key once, in the order read. One gone bad since is logged and skipped."""
        entries = list(self._index.get(kind, {}).items())
        for shard, group in groupby(entries, key=lambda entry: entry[1] >> _OFFSET_BITS):
            with self._shards[shard].open("rb") as file:
                for key, location in group:
                    file.seek(location & (1 << _OFFSET_BITS) - 1)
                    body = _checked_body(file.readline())
                    if body is None:
                        self._report_corrupt(self._shards[shard], location & (1 << _OFFSET_BITS) - 1)
                        self._index[kind].pop(key, None)
                    else:
                        yield key, json.loads(body)["payload"]

    def get(self, key: str, kind: str | None = None) -> dict[str, object] | None:
        """The payload of a key, of the given kind or of the first kind that has it; None when there is none."""
        for name in self._index if kind is None else (kind,):
            location = self._index.get(name, {}).get(key)
            if location is not None:
                path, offset = self._shards[location >> _OFFSET_BITS], location & (1 << _OFFSET_BITS) - 1
                with path.open("rb") as file:
                    file.seek(offset)
                    body = _checked_body(file.readline())
                if body is not None:
                    return json.loads(body)["payload"]
                self._report_corrupt(path, offset)
                # Forgotten, so that the record can be made and appended again.
                self._index[name].pop(key, None)
        return None

    def _add_shard(self, path: Path) -> int:
        self._shards.append(path)
        self._scanned[path] = 0
        return len(self._shards) - 1

    def _scan(self, path: Path, shard: int) -> None:
        """Index the complete lines of a shard from where the last scan ended."""
        offset = self._scanned[path]
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    self.torn_tails += 1
                    logger.info("%s: byte %d: unfinished record, ignored", path, offset)
                    break
                start, names = 0, _names(line)
                if names is None:
                    self._report_corrupt(path, offset)
                    # A damaged newline glues two records together; the second still begins before the last tab.
                    start = max(0, line.rfind(b"\t") - 8)
                    names = _names(line[start:])
                if names is not None:
                    key, kind = names
                    self._index.setdefault(kind, {}).setdefault(key, shard << _OFFSET_BITS | offset + start)
                offset += len(line)
        self._scanned[path] = offset

    def _report_corrupt(self, path: Path, offset: int) -> None:
        self.corrupt_records += 1
        logger.warning("%s: byte %d: corrupt record, skipped", path, offset)

    def _abandon_unless_clean(self) -> None:
        """Go on in a fresh shard when this one may end in part of a record."""
        if self._writer is not None and not self._writer.clean:
            os.close(self._writer.handle)
            self._writer = None

    def _named(self, error: OSError, doing: str) -> Exception:
        message = f"{self.folder}: {doing}: {error.strerror}: every acknowledged record is intact"
        if error.errno in _FULL:
            return StoreFull(f"{message}, free space and run again")
        return OSError(error.errno, message)


class _ShardWriter:
    """Appends whole lines to a new file; after a failed write the file ends where it did before."""

    def __init__(self, folder: Path, writer_name: str) -> None:
        for number in count():
            self.path = folder / f"{writer_name}.{number:06d}{_SUFFIX}"
            try:
                self.handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                break
            except FileExistsError:
                continue
        self.end = 0
        self.clean = True
        """False when part of a line could not be taken back; then nothing may be appended any more."""
        fsync_directory(folder)

    def write(self, line: bytes) -> int:
        """Append one line and return its offset. One ``os.write``, more only where the kernel takes less."""
        start, rest = self.end, memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self.handle, rest):]
            self.end = start + len(line)
        except BaseException:
            try:
                os.ftruncate(self.handle, start)
            except OSError:
                self.clean = False
            raise
        return start


def _checked_body(line: bytes) -> bytes | None:
    """The JSON of a line whose checksum fits, else None."""
    checksum, tab, body = line.removesuffix(b"\n").partition(b"\t")
    return body if tab and checksum == b"%08x" % zlib.crc32(body) else None


def _names(line: bytes) -> tuple[str, str] | None:
    """Key and kind of a line, None when it is no intact record."""
    body = _checked_body(line)
    if body is None:
        return None
    if head := _HEAD.match(body):
        return head[1].decode("ascii"), head[2].decode("ascii")
    try:
        data = json.loads(body)
        return (str(data["key"]), str(data["kind"])) if isinstance(data["payload"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None
