"""An append-only store of JSON records in a folder of shard files (see ``shards`` for the format).

Every writer appends to a new shard of its own, so writers need no locks and never append to a torn
line. An index on disk (see ``index``) finds records by key; it is a cache, the shards alone are the
store.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import TypeVar

from spark_nemo.utils.files import fsync_path

from .index import Entry, IndexFailure, IndexFile, ShardState, StoreIndex
from .shards import Names, ShardWriter, checked_body, encode_line, read_lines, shard_paths

logger = logging.getLogger(__name__)

T = TypeVar("T")
Payload = dict[str, object]
_WRITER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OPEN_SHARDS = 32
_COMMIT_EVERY = 4096
"""Records between two commits of the index, and the most that a restart reads again."""


class StoreFull(RuntimeError):
    """The disk, quota or file size limit is exhausted; every acknowledged record is intact."""


class RecordStore:
    """Records by key in one folder, for one thread; any number of processes may have it open.

    ``writer_name`` names this process's shards; without it the store is read-only and the folder
    must exist. A key names one record of its kind: a second append does nothing, and if two
    writers wrote it, the first one read (shards in order of their names) counts. ``append`` returns
    when the record is on disk; with ``fsync_every=n`` only every n-th append waits for the disk,
    and ``flush`` or ``close`` writes the rest. A record may name a ``parent``, the key of the
    record it is about. Memory does not grow with the number of records, except for ``keys``.

    Raises ``ValueError`` for an invalid name or payload and for a read-only append, and
    ``StoreFull`` if the disk is full.
    """

    def __init__(
        self, folder: str | Path, writer_name: str | None = None, *, fsync_every: int = 1
    ) -> None:
        if writer_name is not None and not _WRITER_NAME.fullmatch(writer_name):
            raise ValueError(
                f"RecordStore writer_name={writer_name!r}: use letters, digits, '.', '_' and '-'"
            )
        if fsync_every < 1:
            raise ValueError(f"RecordStore fsync_every={fsync_every}: must be at least 1")
        self.folder = Path(folder)
        self.corrupt_records = 0
        """Skipped lines with a bad checksum, each logged with file and byte offset.

        A reader checks every line on opening; a writer that resumes from its index checks the lines
        it reads.
        """
        self.torn_tails = 0
        """Shards whose last line is unfinished: the unacknowledged record of a killed writer."""
        self._writer_name = writer_name
        self._fsync_every = fsync_every
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._writer: ShardWriter | None = None
        self._unsynced: list[tuple[str, str]] = []
        self._index: StoreIndex | None = None
        self._index_file: IndexFile | None = None
        if writer_name is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_path(self.folder.parent)
        elif not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder}: no record store here; "
                "check the path or run the earlier stage first"
            )
        self._open_index()

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def refresh(self) -> None:
        """Index the records that other writers have added since the last refresh."""
        self._ask(self._scan_all)

    def append(self, key: str, kind: str, payload: Payload, *, parent: str | None = None) -> bool:
        """Write one record; return False if the store already has the key of this kind."""
        if self._writer_name is None:
            raise ValueError(f"{self.folder}: opened without a writer_name, so for reading only")
        if not key or not kind or parent == "" or not isinstance(payload, dict):
            raise ValueError(
                f"{self.folder}: record {key!r}: key, kind and parent must not be empty, "
                "and the payload must be a dict"
            )
        if self._ask(lambda index: index.has(kind, key)):
            return False
        line = encode_line(Names(key, kind, parent), payload)
        try:
            if self._writer is None:
                self._writer = ShardWriter(self.folder, self._writer_name)
            offset = self._writer.write(line)
        except OSError as error:
            self._abandon_unless_clean()
            raise self._with_context(error, f"writing a record of {len(line)} bytes") from error
        # Before the index may fail: a new index reads the shards, this line included.
        self._unsynced.append((kind, key))
        self._ask(lambda index: self._add_own(index, kind, key, parent, offset, line))
        if len(self._unsynced) >= self._fsync_every:
            self.flush()
        return True

    def flush(self) -> None:
        """Write every appended record to disk; if that fails, unwritten ones are taken back."""
        if self._writer is None or not self._unsynced:
            return
        try:
            os.fsync(self._writer.handle)
        except OSError as error:
            # After a failed fsync the kernel may have dropped the pages: only a new file can be
            # trusted.
            for kind, key in self._unsynced:
                self._ask(lambda index, kind=kind, key=key: index.forget(kind, key))
            lost = len(self._unsynced)
            self._unsynced = []
            self._writer.clean = False
            self._abandon_unless_clean()
            raise self._with_context(
                error, f"syncing {lost} records, which are taken back"
            ) from error
        self._unsynced = []
        self._ask(lambda index: index.commit() if index.pending >= _COMMIT_EVERY else None)

    def close(self) -> None:
        """Flush and release shard and index. Reading afterwards builds a new index."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                os.close(self._writer.handle)
                self._writer = None
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._close_index(keep=True)

    def kinds(self) -> list[str]:
        """Kinds of the stored records, in the order first read."""
        return self._ask(lambda index: index.kinds())

    def keys(self, kind: str) -> set[str]:
        """Keys of a kind, in memory; for a large store stream with ``iter``."""
        return self._ask(lambda index: set(index.keys(kind)))

    def keys_with_prefix(self, kind: str, prefix: str, limit: int) -> list[str]:
        """Up to ``limit`` keys of a kind that begin with ``prefix``, in order."""
        return self._ask(lambda index: index.keys_with_prefix(kind, prefix, limit))

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of records by shard file name and kind; duplicates in two shards count once."""
        return self._ask(lambda index: index.counts())

    def iter(self, kind: str, *, by_key: bool = False) -> Iterator[tuple[str, Payload]]:
        """Stream ``(key, payload)``, each key once, in the order read (fastest) or of the keys.

        A record that was damaged meanwhile is logged and skipped.
        """
        entries = self._ask(
            lambda index: index.in_key_order(kind) if by_key else index.in_order_read(kind)
        )
        return self._payloads(kind, entries)

    def children(self, parent: str, kind: str) -> Iterator[tuple[str, Payload]]:
        """Stream ``(key, payload)`` of a kind's records with this parent, in the order of keys."""
        return self._payloads(kind, self._ask(lambda index: index.children(parent, kind)))

    def children_per_parent(self, kind: str) -> dict[int, int]:
        """Number of parents by their number of children of this kind."""
        return self._ask(lambda index: index.children_per_parent(kind))

    def get(self, key: str, kind: str | None = None) -> Payload | None:
        """Payload of a key, of the given kind or of the first kind that has it, or None."""
        kinds = self.kinds() if kind is None else [kind]
        for name in kinds:
            entry = self._ask(lambda index, name=name: index.find(name, key))
            payload = self._read(name, entry) if entry is not None else None
            if payload is not None:
                return payload
        return None

    def parent(self, key: str, kind: str) -> str | None:
        """Key of a record's parent; None without a parent or without the record."""
        entry = self._ask(lambda index: index.find(kind, key))
        return None if entry is None else entry.parent

    def location(self, key: str, kind: str) -> tuple[str, int] | None:
        """Shard file name and byte offset of the record that ``get`` returns, or None."""
        entry = self._ask(lambda index: index.find(kind, key))
        return None if entry is None else (self._shard_name(entry.shard), entry.start)

    def _payloads(self, kind: str, entries: Iterable[Entry]) -> Iterator[tuple[str, Payload]]:
        index = self._index
        for entry in entries:
            if self._index is not index:
                raise RuntimeError(
                    f"{self.folder}: closed, or its index replaced, while being read; read it again"
                )
            payload = self._read(kind, entry)
            if payload is not None:
                yield entry.key, payload

    def _read(self, kind: str, entry: Entry) -> Payload | None:
        """Return the payload at an entry; None, and drop the entry, if the line is damaged."""
        body = checked_body(os.pread(self._file(entry.shard).fileno(), entry.length, entry.start))
        if body is not None:
            data = json.loads(body)
            if (data["key"], data["kind"]) == (entry.key, kind):
                return data["payload"]
        self._report_corrupt(self._shard_name(entry.shard), entry.start)
        # Dropped, so that the record can be made and appended again.
        self._ask(lambda index: index.forget(kind, entry.key))
        return None

    def _file(self, shard: int) -> FileIO:
        file = self._files.pop(shard, None)
        if file is None:
            file = (self.folder / self._shard_name(shard)).open("rb", buffering=0)
            if len(self._files) >= _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files[shard] = file
        return file

    def _shard_name(self, shard: int) -> str:
        return self._ask(lambda index: index.shard_name(shard))

    def _add_own(
        self, index: StoreIndex, kind: str, key: str, parent: str | None, offset: int, line: bytes
    ) -> None:
        name = self._writer.path.name
        state = index.shards.get(name) or index.add_shard(name)
        # Otherwise a new index has read the line already.
        if state.scanned <= offset:
            index.add([(kind, key, parent, state.id, offset, len(line))])
            state.scanned = offset + len(line)
            state.last = offset
            state.checksum = line[:8].decode("ascii")

    def _open_index(self) -> None:
        """Open the writer's own index if it fits the shards, else a temporary one."""
        if self._writer_name is not None:
            try:
                self._index_file = IndexFile(self.folder, self._writer_name)
                index = self._index_file.open()
                if not self._is_current(index):
                    index.close()
                    index = self._index_file.open(is_current=False)
                self._index = index
            except (OSError, IndexFailure) as error:
                logger.info(
                    "%s: no index file for %s (%s); using a temporary index",
                    self.folder,
                    self._writer_name,
                    error,
                )
                self._close_index(keep=False)
        self._ask(self._scan_all)

    def _is_current(self, index: StoreIndex) -> bool:
        """True if every indexed shard exists with its last indexed record in place."""
        for state in index.shards.values():
            path = self.folder / state.name
            if not path.is_file() or path.stat().st_size < state.scanned:
                return False
            if state.checksum:
                with path.open("rb") as file:
                    file.seek(state.last)
                    line = file.readline()
                if line[:8] != state.checksum.encode() or checked_body(line) is None:
                    return False
        return True

    def _ask(self, question: Callable[[StoreIndex], T]) -> T:
        """Query the index; if it fails, as on a full disk, query a new temporary one."""
        if self._index is not None:
            try:
                return question(self._index)
            except IndexFailure as error:
                logger.warning(
                    "%s: index: %s; rebuilding it in a temporary file", self.folder, error
                )
                self._close_index(keep=False)
        try:
            self._index = StoreIndex(None)
            self._scan_all(self._index)
            return question(self._index)
        except IndexFailure as error:
            self._close_index(keep=False)
            raise StoreFull(
                f"{self.folder}: a temporary index cannot be written ({error}); set SQLITE_TMPDIR "
                "to a folder with space; every acknowledged record is intact"
            ) from error

    def _close_index(self, keep: bool) -> None:
        index = self._index
        file = self._index_file
        self._index = None
        self._index_file = None
        if index is not None:
            try:
                if keep and file is not None:
                    index.commit()
            except IndexFailure as error:
                logger.warning("%s: index discarded: %s", self.folder, error)
                keep = False
            index.close()
        if file is not None:
            if not keep:
                file.remove()
            file.release()
        # Open files are by shard number, which is the index's own.
        for open_file in self._files.values():
            open_file.close()
        self._files.clear()

    def _scan_all(self, index: StoreIndex) -> None:
        self.torn_tails = 0
        for path in shard_paths(self.folder):
            state = index.shards.get(path.name) or index.add_shard(path.name)
            if path.stat().st_size != state.scanned:
                self._scan(index, path, state)

    def _scan(self, index: StoreIndex, path: Path, state: ShardState) -> None:
        """Index the complete lines of a shard from where the last scan ended."""
        found: list[tuple[str, str, str | None, int, int, int]] = []
        for line in read_lines(path, state.scanned):
            if line.torn:
                self.torn_tails += 1
                logger.info("%s: byte %d: unfinished record, ignored", path, line.offset)
                break
            if line.names is None:
                self._report_corrupt(path.name, line.offset)
            else:
                names = line.names
                found.append(
                    (names.kind, names.key, names.parent, state.id, line.offset, line.length)
                )
                state.last = line.offset
                state.checksum = line.checksum
            state.scanned = line.offset + line.length
            if len(found) >= _COMMIT_EVERY:
                index.add(found)
                found.clear()
                if index.path is not None:
                    index.commit()
        index.add(found)

    def _report_corrupt(self, shard: str, offset: int) -> None:
        self.corrupt_records += 1
        logger.warning("%s: byte %d: corrupt record, skipped", self.folder / shard, offset)

    def _abandon_unless_clean(self) -> None:
        """Continue in a new shard if this one may end in part of a record."""
        if self._writer is not None and not self._writer.clean:
            os.close(self._writer.handle)
            self._writer = None

    def _with_context(self, error: OSError, doing: str) -> Exception:
        message = f"{self.folder}: {doing}: {error.strerror}; every acknowledged record is intact"
        if error.errno in _FULL:
            return StoreFull(f"{message}; free space and rerun the command")
        return OSError(error.errno, message)
