"""Shard files of a record store: one record per line, appended by one writer.

A line is the CRC-32 of the text after the tab as 8 hex digits, a tab, and ASCII JSON with ``key``,
``kind``, ``parent`` (optional) and ``payload``.
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
# Usual beginning of a record: its names can be read without parsing the payload.
_HEAD = re.compile(
    rb'\{"key": "([^"\\]+)", "kind": "([^"\\]+)", (?:"parent": "([^"\\]+)", )?"payload": \{'
)


@dataclass(frozen=True, slots=True)
class Names:
    """Names by which a record is found."""

    key: str
    kind: str
    parent: str | None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a shard at byte ``offset``; ``names`` is None if it has no intact record.

    ``torn``: the line does not end in a newline, so its writer is writing it or was killed.
    ``salvaged``: a damaged newline had joined a damaged record and this one, which begins at
    ``offset``.
    """

    offset: int
    length: int
    names: Names | None
    checksum: str = ""
    torn: bool = False
    salvaged: bool = False


class ShardWriter:
    """Writer of whole lines to a new file; a failed write is truncated away."""

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
        """False if part of a line could not be truncated; then nothing may be appended."""
        fsync_path(folder)

    def write(self, line: bytes) -> int:
        """Append one line and return its offset."""
        start = self.end
        rest = memoryview(line)
        try:
            # One write, unless the kernel accepts only part of the line.
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
    """The line of a record. Raises ``ValueError`` or ``TypeError`` if the payload is not JSON."""
    parent = {} if names.parent is None else {"parent": names.parent}
    record = {"key": names.key, "kind": names.kind, **parent, "payload": payload}
    body = json.dumps(record, allow_nan=False).encode("ascii")
    return b"%08x\t%s\n" % (zlib.crc32(body), body)


def checked_body(line: bytes) -> bytes | None:
    """JSON of a line, or None if its checksum does not fit."""
    checksum, tab, body = line.removesuffix(b"\n").partition(b"\t")
    return body if tab and checksum == b"%08x" % zlib.crc32(body) else None


def read_lines(path: Path, start: int = 0) -> Iterator[Line]:
    """Yield every line from byte ``start``, checked; a damaged line has no names."""
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
                # A damaged newline joins two records; the second begins before the last tab.
                joined = max(0, text.rfind(b"\t") - 8)
                names = _names(text[joined:]) if joined else None
                yield Line(offset, joined if names else len(text), None)
                if names is not None:
                    checksum = text[joined : joined + 8].decode("ascii")
                    yield Line(offset + joined, len(text) - joined, names, checksum, salvaged=True)
            offset += len(text)


def read_record(path: Path, line: Line) -> dict[str, object]:
    """Record of an intact line: ``key``, ``kind``, ``payload`` and optionally ``parent``."""
    with path.open("rb") as file:
        file.seek(line.offset)
        body = checked_body(file.read(line.length))
    if body is None:
        raise ValueError(f"{path}: byte {line.offset}: the record has changed since it was read")
    return json.loads(body)


def shard_paths(folder: Path) -> list[Path]:
    """Shards of a store in the order of their names."""
    return sorted(folder.glob(f"*{SHARD_SUFFIX}"))


def _names(line: bytes) -> Names | None:
    """Names of a line, or None if it is not an intact record."""
    body = checked_body(line)
    if body is None:
        return None
    head = _HEAD.match(body)
    if head is not None:
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
