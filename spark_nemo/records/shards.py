"""The files of a record store: one record per line, appended by one writer, readable without this
code.

A line is the CRC-32 of what follows the tab as 8 hex digits, a tab, and ASCII JSON with ``key``,
``kind``, ``parent`` (absent when there is none) and ``payload``.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from spark_nemo.utils.files import fsync_path

SHARD_SUFFIX = ".records"
# The usual beginning of a record, from which the names are read without parsing the payload.
_HEAD = re.compile(
    rb'\{"key": "([^"\\]+)", "kind": "([^"\\]+)", (?:"parent": "([^"\\]+)", )?"payload": \{'
)


@dataclass(frozen=True, slots=True)
class Names:
    """What a record is found by."""

    key: str
    kind: str
    parent: str | None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a shard at byte ``offset``; ``names`` is None when no intact record is in it.

    ``torn``: it does not end in a newline, so its writer is writing it or was killed. ``salvaged``:
    a damaged newline had glued a damaged record to this one, which begins at ``offset``.
    """

    offset: int
    length: int
    names: Names | None
    checksum: str = ""
    torn: bool = False
    salvaged: bool = False


class ShardWriter:
    """Appends whole lines to a new file; after a failed write the file ends where it did before."""

    def __init__(self, folder: Path, writer_name: str) -> None:
        for number in count():
            self.path = folder / f"{writer_name}.{number:06d}{SHARD_SUFFIX}"
            try:
                self.handle = os.open(
                    self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644
                )
                break
            except FileExistsError:
                continue
        self.end = 0
        self.clean = True
        """False when part of a line could not be taken back; then nothing may be appended any more.
        """
        fsync_path(folder)

    def write(self, line: bytes) -> int:
        """Append one line and return its offset. One ``os.write``, more only where the kernel takes
        less.
        """
        start, rest = self.end, memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self.handle, rest) :]
            self.end = start + len(line)
        except BaseException:
            try:
                os.ftruncate(self.handle, start)
            except OSError:
                self.clean = False
            raise
        return start


def encode_line(names: Names, payload: dict[str, object]) -> bytes:
    """The line of a record. Raises ``ValueError`` or ``TypeError`` for a payload that is no JSON."""
    parent = {} if names.parent is None else {"parent": names.parent}
    record = {"key": names.key, "kind": names.kind, **parent, "payload": payload}
    body = json.dumps(record, allow_nan=False).encode("ascii")
    return b"%08x\t%s\n" % (zlib.crc32(body), body)


def checked_body(line: bytes) -> bytes | None:
    """The JSON of a line whose checksum fits, else None."""
    checksum, tab, body = line.removesuffix(b"\n").partition(b"\t")
    return body if tab and checksum == b"%08x" % zlib.crc32(body) else None


def read_lines(path: Path, start: int = 0) -> Iterator[Line]:
    """Every line from byte ``start`` on, checked. A damaged line gives a ``Line`` without names."""
    offset = start
    with path.open("rb") as file:
        file.seek(start)
        for text in file:
            if not text.endswith(b"\n"):
                yield Line(offset, len(text), None, torn=True)
                return
            names = _names(text)
            if names is not None:
                yield Line(offset, len(text), names, text[:8].decode("ascii"))
            else:
                # A damaged newline glues two records together; the second still begins before the
                # last tab.
                glued = max(0, text.rfind(b"\t") - 8)
                names = _names(text[glued:]) if glued else None
                yield Line(offset, glued if names else len(text), None)
                if names is not None:
                    checksum = text[glued : glued + 8].decode("ascii")
                    yield Line(offset + glued, len(text) - glued, names, checksum, salvaged=True)
            offset += len(text)


def read_record(path: Path, line: Line) -> dict[str, object]:
    """The whole record of an intact line of ``read_lines``: ``key``, ``kind``, ``payload`` and
    perhaps ``parent``.
    """
    with path.open("rb") as file:
        file.seek(line.offset)
        body = checked_body(file.read(line.length))
    if body is None:
        raise ValueError(f"{path}: byte {line.offset}: the record has changed since it was read")
    return json.loads(body)


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a store in the order of their names."""
    return sorted(folder.glob(f"*{SHARD_SUFFIX}"))


def _names(line: bytes) -> Names | None:
    """Names of a line, None when it is no intact record."""
    body = checked_body(line)
    if body is None:
        return None
    if head := _HEAD.match(body):
        key, kind, parent = head.groups()
        return Names(
            key.decode("ascii"), kind.decode("ascii"), parent.decode("ascii") if parent else None
        )
    try:
        data = json.loads(body)
        parent = data.get("parent")
        names = Names(str(data["key"]), str(data["kind"]), None if parent is None else str(parent))
        return names if isinstance(data["payload"], dict) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
