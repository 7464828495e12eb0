"""Looking for what is wrong with a store of stage I: every byte is read and every relation between
records checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.records import SOLUTION, VERIFICATION, content_key
from spark_nemo.records.shards import Line, read_lines, read_record, shard_paths
from spark_nemo.records.store import RecordStore

_LARGEST_INDEX = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in a shard at a byte. ``harmless``: what a killed writer leaves behind;
    nothing is lost.
    """

    shard: str
    offset: int
    what: str
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.shard}: byte {self.offset}: {self.what}"


def audit_store(folder: Path, made_by: Mapping[str, object] | None = None) -> Iterator[Finding]:
    """Every fault of a store: bad checksums, records whose parent is missing, records of one key
    that differ, and keys that are not those of their content. ``made_by`` is what stage I wrote
    beside the store; without it the last check sees only whether record and payload name the same
    key.

    Records that a writer adds meanwhile may be missed. Memory does not grow with the records.
    """
    with RecordStore(folder) as store:
        for path in shard_paths(folder):
            for line in read_lines(path):
                if line.torn:
                    what = (
                        f"the last {line.length} bytes are an unfinished record, never acknowledged"
                    )
                    yield Finding(path.name, line.offset, what, harmless=True)
                elif line.names is None:
                    yield Finding(
                        path.name, line.offset, f"{line.length} bytes do not fit their checksum"
                    )
                else:
                    for what in _faults(store, path, line, made_by):
                        yield Finding(path.name, line.offset, what)


def _faults(
    store: RecordStore, path: Path, line: Line, made_by: Mapping[str, object] | None
) -> Iterator[str]:
    names = line.names
    assert names is not None
    payload = read_record(path, line)["payload"]
    record = f"{names.kind} {names.key}"
    counted = store.location(names.key, names.kind)
    if (
        counted not in (None, (path.name, line.offset))
        and store.get(names.key, names.kind) != payload
    ):
        yield f"{record} differs from the record of the same key that counts, in {counted[0]} at byte {counted[1]}"
    parent = names.parent or (payload.get("solution_key") if names.kind == VERIFICATION else None)
    if parent is not None and not any(store.location(parent, kind) for kind in store.kinds()):
        yield f"{record} is about {parent}, which is not in the store"
    if payload.get("key", names.key) != names.key:
        yield f"{record} holds the payload of {payload['key']}"
    elif made_by is not None and not _has_its_key(names.key, names.kind, payload, made_by):
        yield f"{record} is not the key of its content under the settings in fingerprint.json"


def _has_its_key(
    key: str, kind: str, payload: Mapping[str, object], made_by: Mapping[str, object]
) -> bool:
    """Whether ``Stage1Sampler`` would give this content this key; True where that cannot be derived."""
    role = {SOLUTION: "generator", VERIFICATION: "verifier"}.get(kind)
    fields = ("the grammar", "stage1.prompt_set", f"models.{role}", f"stage1.{role}_sampling")
    if role is None or not {*fields, "run.seed"} <= made_by.keys():
        return True
    by, seed = [made_by[field] for field in fields], made_by["run.seed"]
    if kind == VERIFICATION:
        if (asked_with := made_by.get("stage1.verifier_prompt", "verify")) != "verify":
            by.append(asked_with)
        return content_key(VERIFICATION, payload["solution_key"], by, seed, payload["vote"]) == key
    # A solution does not record which of its problem's samples it is.
    return any(
        content_key(SOLUTION, payload["question"], by, seed, n) == key
        for n in range(_LARGEST_INDEX)
    )
