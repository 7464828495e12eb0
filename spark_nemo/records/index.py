"""Index of a store's records on disk, so that memory does not grow with the records.

The index is a cache of the shards, never a source of truth: if it is missing, damaged, of another
format or does not fit the shards, it is discarded and rebuilt by reading them. Every opener has its
own index, so nothing is locked across nodes. A writer keeps ``.index/<writer>@<host>.sqlite`` and
resumes from it. A reader, and a second writer of the same name on one host, uses SQLite's unnamed
temporary file (in ``SQLITE_TMPDIR``, ``TMPDIR`` or ``/tmp``), which disappears with the process.
``.index`` may be deleted while no writer runs; it has about 120 bytes per record.
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
"""Exception of every ``StoreIndex`` method if the index cannot be read or written."""
_FORMAT = 1
_CACHE_KIB = 2048
_PAGE = 512
_SCHEMA = """
CREATE TABLE shard (id INTEGER PRIMARY KEY, name TEXT UNIQUE, scanned INTEGER, last INTEGER,
                    checksum TEXT);
CREATE TABLE kind (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE record (id INTEGER PRIMARY KEY, kind INTEGER, key TEXT, parent TEXT, shard INTEGER,
                     start INTEGER, length INTEGER);
CREATE UNIQUE INDEX by_key ON record (kind, key);
"""
_COLUMNS = "record.id, record.key, record.parent, record.shard, record.start, record.length"


class Entry(NamedTuple):
    """Location of one record: ``length`` bytes from byte ``start`` of the shard with this id."""

    row: int
    key: str
    parent: str | None
    shard: int
    start: int
    length: int


@dataclass(slots=True)
class ShardState:
    """Progress of indexing a shard: records up to byte ``scanned``, the last one at ``last``."""

    id: int
    name: str
    scanned: int = 0
    last: int = 0
    checksum: str = ""


class StoreIndex:
    """Index of one opener. After an ``IndexFailure``, discard it and build another."""

    def __init__(self, path: Path | None) -> None:
        """Open or create the file, which the caller must own; None is a temporary file."""
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
        else:
            found = execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
        if not self._database.in_transaction:
            execute("BEGIN")

    def add_shard(self, name: str) -> ShardState:
        """Add a shard."""
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
        """Add ``(kind, key, parent, shard, start, length)``; the first record of a key counts."""
        rows = [(self._kind(kind), *rest) for kind, *rest in records]
        self._database.executemany(
            "INSERT OR IGNORE INTO record (kind, key, parent, shard, start, length) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )
        self.pending += len(rows)

    def find(self, kind: str, key: str) -> Entry | None:
        """Location of a record, or None."""
        row = self._database.execute(
            f"SELECT {_COLUMNS} FROM record WHERE kind=? AND key=?", (self._kinds.get(kind), key)
        ).fetchone()
        return None if row is None else Entry(*row)

    def has(self, kind: str, key: str) -> bool:
        """True if a record of this kind and key is indexed."""
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
        """Kinds in the order first added."""
        return list(self._kinds)

    def in_order_read(self, kind: str) -> Iterator[Entry]:
        """Yield entries of a kind in the order they were added, up to the current last one."""
        end = self._database.execute("SELECT max(id) FROM record").fetchone()[0] or 0
        return self._pages(
            "kind=? AND id>? AND id<=?", "id", (self._kinds.get(kind),), 0, 0, (end,)
        )

    def in_key_order(self, kind: str) -> Iterator[Entry]:
        """Yield entries of a kind in the order of their keys."""
        return self._pages("kind=? AND key>?", "key", (self._kinds.get(kind),), "", 1)

    def children(self, parent: str, kind: str) -> list[Entry]:
        """Entries of a kind with this parent, in the order of their keys."""
        self._database.execute("CREATE INDEX IF NOT EXISTS by_parent ON record (parent, kind, key)")
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM record WHERE parent=? AND kind=? ORDER BY key",
            (parent, self._kinds.get(kind)),
        )
        return [Entry(*row) for row in rows]

    def keys_with_prefix(self, kind: str, prefix: str, limit: int) -> list[str]:
        """At most ``limit`` keys of a kind that begin with ``prefix``, in order."""
        rows = self._database.execute(
            "SELECT key FROM record WHERE kind=? AND key>=? AND key<? ORDER BY key LIMIT ?",
            (self._kinds.get(kind), prefix, prefix + "\U0010ffff", limit),
        )
        return [row[0] for row in rows]

    def keys(self, kind: str) -> Iterator[str]:
        """Yield all keys of a kind, in no particular order."""
        rows = self._database.execute(
            "SELECT key FROM record WHERE kind=?", (self._kinds.get(kind),)
        )
        return (row[0] for row in rows)

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of records by shard name and kind."""
        rows = self._database.execute(
            "SELECT shard.name, kind.name, count(*) FROM record "
            "JOIN shard ON shard.id=record.shard "
            "JOIN kind ON kind.id=record.kind GROUP BY record.shard, record.kind"
        )
        return {(shard, kind): number for shard, kind, number in rows}

    def children_per_parent(self, kind: str) -> dict[int, int]:
        """Number of parents by their number of children of this kind."""
        rows = self._database.execute(
            "SELECT children, count(*) FROM "
            "(SELECT count(*) AS children FROM record WHERE kind=? AND parent NOTNULL "
            "GROUP BY parent) GROUP BY children",
            (self._kinds.get(kind),),
        )
        return dict(rows.fetchall())

    def commit(self) -> None:
        """Make the added records, and the progress of every shard, survive a kill."""
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
        """Close the file, which has only what was committed."""
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
        # Page by page: a cursor that stays open while its table changes may skip or repeat rows.
        # Pages by id must not use the index by key: SQLite has no statistics, prefers it, and would
        # sort the whole kind again for every page.
        table = "record NOT INDEXED" if order == "id" else "record"
        query = f"SELECT {_COLUMNS} FROM {table} WHERE {where} ORDER BY {order} LIMIT {_PAGE}"
        while rows := self._database.execute(query, (*before, after, *last)).fetchall():
            yield from (Entry(*row) for row in rows)
            after = rows[-1][column]


class IndexFile:
    """A writer's own index file, under a lock that the kernel releases when the process ends."""

    def __init__(self, store: Path, writer_name: str) -> None:
        """Lock the file.

        Raises ``OSError`` if another process has it or the folder is read-only.
        """
        folder = store / INDEX_FOLDER
        folder.mkdir(exist_ok=True)
        # By host: on a network file system a lock may hold on its own node only.
        name = f"{writer_name}@{platform.node() or 'localhost'}"
        self.path = folder / f"{name}.sqlite"
        self._lock = (folder / f"{name}.lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise

    def open(self, is_current: bool = True) -> StoreIndex:
        """Open the index in the file; create a new one if it is unusable or not current."""
        if is_current:
            try:
                return StoreIndex(self.path)
            except IndexFailure as error:
                logger.info("%s: %s; rebuilding the index from the shards", self.path, error)
        self.remove()
        return StoreIndex(self.path)

    def remove(self) -> None:
        """Delete the file and its log; the index must be closed."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def release(self) -> None:
        """Release the lock."""
        self._lock.close()
