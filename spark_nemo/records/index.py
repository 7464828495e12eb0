"""Where each record of a store lies, on disk, so that a store's memory does not grow with its
records.

The index is a cache of the shards and never a source of truth: one that is missing, damaged, of
another format or does not fit the shards is thrown away and made again by reading them. Every
opener has an index of its own, so nothing is locked across nodes: a writer keeps
``.index/<writer>@<host>.sqlite`` and resumes from it; a reader, and a second writer of the same
name on one host, uses SQLite's unnamed temporary file (in ``SQLITE_TMPDIR``, ``TMPDIR`` or
``/tmp``), which is gone with its process. ``.index`` may be deleted whenever nobody writes; about
120 bytes a record are kept there.
"""

from __future__ import annotations

import fcntl
import logging
import platform
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

INDEX_FOLDER = ".index"
IndexFailure = sqlite3.Error
"""What any call of ``StoreIndex`` raises when the index cannot be read or written."""
_FORMAT = 1
_CACHE_KIB = 2048
_PAGE = 512
_SCHEMA = """
CREATE TABLE shard (id INTEGER PRIMARY KEY, name TEXT UNIQUE, scanned INTEGER, last INTEGER, checksum TEXT);
CREATE TABLE kind (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE record (id INTEGER PRIMARY KEY, kind INTEGER, key TEXT, parent TEXT, shard INTEGER, start INTEGER,
                     length INTEGER);
CREATE UNIQUE INDEX by_key ON record (kind, key);
"""
_COLUMNS = "record.id, record.key, record.parent, record.shard, record.start, record.length"


class Entry(NamedTuple):
    """Where one record lies: ``length`` bytes from byte ``start`` of the shard with this id."""

    row: int
    key: str
    parent: str | None
    shard: int
    start: int
    length: int


@dataclass(slots=True)
class ShardState:
    """How far a shard is indexed: its records up to byte ``scanned``, the last of them at ``last``."""

    id: int
    name: str
    scanned: int = 0
    last: int = 0
    checksum: str = ""


class StoreIndex:
    """The index of one opener. Every method may raise ``IndexFailure``; then throw the index away
    and make another.
    """

    def __init__(self, path: Path | None) -> None:
        """Open or create the file, which the caller must own; None is a temporary one."""
        self.path = path
        self.pending = 0
        """Changes since the last commit."""
        self._database = sqlite3.connect(
            path or "", isolation_level=None, check_same_thread=False, timeout=0
        )
        try:
            self._configure()
            self.shards = {
                row[1]: ShardState(*row) for row in self._database.execute("SELECT * FROM shard")
            }
            self._names = {state.id: name for name, state in self.shards.items()}
            self._kinds = dict(self._database.execute("SELECT name, id FROM kind ORDER BY id"))
        except BaseException:
            self._database.close()
            raise

    def _configure(self) -> None:
        execute = self._database.execute
        execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        execute("PRAGMA temp_store=FILE")
        if self.path is None:
            execute("PRAGMA journal_mode=OFF")
            execute("PRAGMA synchronous=OFF")
        else:
            # Exclusive before the first access: the write-ahead log then needs no shared memory,
            # which NFS lacks.
            execute("PRAGMA locking_mode=EXCLUSIVE")
            execute("PRAGMA journal_mode=WAL")
            execute("PRAGMA synchronous=NORMAL")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not execute("SELECT 1 FROM sqlite_master").fetchone():
            self._database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_FORMAT}; COMMIT;")
        elif version != _FORMAT:
            raise sqlite3.DatabaseError(f"index format {version}, not {_FORMAT}")
        elif (found := execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        if not self._database.in_transaction:
            execute("BEGIN")

    def add_shard(self, name: str) -> ShardState:
        """Take a shard in."""
        row = self._database.execute(
            "INSERT INTO shard (name, scanned, last) VALUES (?, 0, 0)", (name,)
        ).lastrowid
        self.shards[name] = ShardState(row, name)
        self._names[row] = name
        return self.shards[name]

    def shard_name(self, shard: int) -> str:
        """File name of the shard with this id."""
        return self._names[shard]

    def add(self, records: Iterable[tuple[str, str, str | None, int, int, int]]) -> None:
        """Add ``(kind, key, parent, shard, start, length)``; of a kind's key the first one added
        stays.
        """
        rows = [(self._kind(kind), *rest) for kind, *rest in records]
        self._database.executemany(
            "INSERT OR IGNORE INTO record (kind, key, parent, shard, start, length) VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )
        self.pending += len(rows)

    def find(self, kind: str, key: str) -> Entry | None:
        """Where a record lies, None when there is none."""
        row = self._database.execute(
            f"SELECT {_COLUMNS} FROM record WHERE kind=? AND key=?", (self._kinds.get(kind), key)
        ).fetchone()
        return None if row is None else Entry(*row)

    def has(self, kind: str, key: str) -> bool:
        """Whether there is a record of this kind and key."""
        found = self._database.execute(
            "SELECT 1 FROM record WHERE kind=? AND key=?", (self._kinds.get(kind), key)
        )
        return found.fetchone() is not None

    def forget(self, kind: str, key: str) -> None:
        """Drop a record from the index, so that it can be made and added again."""
        self._database.execute(
            "DELETE FROM record WHERE kind=? AND key=?", (self._kinds.get(kind), key)
        )
        self.pending += 1

    def kinds(self) -> list[str]:
        """Kinds met so far, in the order met."""
        return list(self._kinds)

    def in_order_read(self, kind: str) -> Iterator[Entry]:
        """Entries of a kind in the order they were added, up to the last one there is now."""
        end = self._database.execute("SELECT max(id) FROM record").fetchone()[0] or 0
        return self._pages(
            "kind=? AND id>? AND id<=?", "id", (self._kinds.get(kind),), 0, 0, (end,)
        )

    def in_key_order(self, kind: str) -> Iterator[Entry]:
        """Entries of a kind in the order of their keys."""
        return self._pages("kind=? AND key>?", "key", (self._kinds.get(kind),), "", 1)

    def children(self, parent: str, kind: str) -> list[Entry]:
        """Entries of a kind with this parent, in the order of their keys."""
        self._database.execute("CREATE INDEX IF NOT EXISTS by_parent ON record (parent, kind, key)")
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM record WHERE parent=? AND kind=? ORDER BY key",
            (parent, self._kinds.get(kind)),
        )
        return [Entry(*row) for row in rows]

    def without_parent(self, kind: str) -> Iterator[Entry]:
        """Entries of a kind that name no parent, in the order added."""
        return self._pages(
            "kind=? AND parent IS NULL AND id>?", "id", (self._kinds.get(kind),), 0, 0
        )

    def set_parent(self, row: int, parent: str) -> None:
        """Name the parent of an entry, for this index only."""
        self._database.execute("UPDATE record SET parent=? WHERE id=?", (parent, row))
        self.pending += 1

    def keys_with_prefix(self, kind: str, prefix: str, limit: int) -> list[str]:
        """Up to ``limit`` keys of a kind that begin so, in order."""
        rows = self._database.execute(
            "SELECT key FROM record WHERE kind=? AND key>=? AND key<? ORDER BY key LIMIT ?",
            (self._kinds.get(kind), prefix, prefix + "\U0010ffff", limit),
        )
        return [row[0] for row in rows]

    def keys(self, kind: str) -> Iterator[str]:
        """All keys of a kind, in no particular order."""
        rows = self._database.execute(
            "SELECT key FROM record WHERE kind=?", (self._kinds.get(kind),)
        )
        return (row[0] for row in rows)

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of records by shard name and kind."""
        rows = self._database.execute(
            "SELECT shard.name, kind.name, count(*) FROM record JOIN shard ON shard.id=record.shard "
            "JOIN kind ON kind.id=record.kind GROUP BY record.shard, record.kind"
        )
        return {(shard, kind): number for shard, kind, number in rows}

    def children_per_parent(self, kind: str) -> dict[int, int]:
        """How many parents have so many children of this kind, by the number of children."""
        rows = self._database.execute(
            "SELECT children, count(*) FROM (SELECT count(*) AS children FROM record WHERE kind=? AND parent NOTNULL "
            "GROUP BY parent) GROUP BY children",
            (self._kinds.get(kind),),
        )
        return dict(rows.fetchall())

    def commit(self) -> None:
        """Make what was added last a kill, with how far every shard was scanned."""
        self._database.executemany(
            "UPDATE shard SET scanned=?, last=?, checksum=? WHERE id=?",
            [
                (state.scanned, state.last, state.checksum, state.id)
                for state in self.shards.values()
            ],
        )
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")
        self.pending = 0

    def close(self) -> None:
        """Let go of the file; what was not committed is not in it."""
        self._database.close()

    def _kind(self, name: str) -> int:
        if name not in self._kinds:
            self._kinds[name] = self._database.execute(
                "INSERT INTO kind (name) VALUES (?)", (name,)
            ).lastrowid
        return self._kinds[name]

    def _pages(
        self,
        where: str,
        order: str,
        before: tuple[object, ...],
        after: object,
        column: int,
        last: tuple[object, ...] = (),
    ) -> Iterator[Entry]:
        # Page by page, because a cursor that stays open while its table changes may skip or repeat
        # rows. In the order of ids the index by key must not be used: SQLite, which has no
        # statistics, prefers it and sorts the whole kind anew for every page.
        table = "record NOT INDEXED" if order == "id" else "record"
        query = f"SELECT {_COLUMNS} FROM {table} WHERE {where} ORDER BY {order} LIMIT {_PAGE}"
        while rows := self._database.execute(query, (*before, after, *last)).fetchall():
            yield from (Entry(*row) for row in rows)
            after = rows[-1][column]


class IndexFile:
    """A writer's own index file, held by a lock that the kernel lets go of when the process ends."""

    def __init__(self, store: Path, writer_name: str) -> None:
        """Raises ``OSError`` when another process has it or the folder cannot be written or locked."""
        folder = store / INDEX_FOLDER
        folder.mkdir(exist_ok=True)
        # With the host, because on a network file system a lock may hold on its own node only.
        name = f"{writer_name}@{platform.node() or 'localhost'}"
        self.path = folder / f"{name}.sqlite"
        self._lock = (folder / f"{name}.lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise

    def open(self, is_current: bool = True) -> StoreIndex:
        """The index in the file; a new one when it cannot be used or ``is_current`` is False."""
        if is_current:
            try:
                return StoreIndex(self.path)
            except IndexFailure as error:
                logger.info("%s: %s: made again from the shards", self.path, error)
        self.remove()
        return StoreIndex(self.path)

    def remove(self) -> None:
        """Delete the file and its log. Its index must be closed."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def release(self) -> None:
        """Let another opener have the file."""
        self._lock.close()
