"""Check of a stage I store: every byte is read, and every relation between records is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.records import SOLUTION, VERIFICATION, content_key
from spark_nemo.records.shards import Line, read_lines, read_record, shard_paths
from spark_nemo.records.store import RecordStore

_MAX_SOLUTION_INDEX = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault at a byte of a shard. A killed writer leaves ``harmless`` ones; nothing is lost."""

    shard: str
    offset: int
    what: str
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.shard}: byte {self.offset}: {self.what}"


def audit_store(folder: Path, fingerprint: Mapping[str, object] | None = None) -> Iterator[Finding]:
    """Yield every fault of a store.

    Faults are bad checksums, records whose parent is missing, different records of one key, and
    keys that do not belong to their content. ``fingerprint`` is the one that stage I wrote next to
    the store; without it, keys are only compared with the key in the payload.

    Records that a writer adds meanwhile may be missed. Memory does not grow with the records.
    """
    with RecordStore(folder) as store:
        for path in shard_paths(folder):
            for line in read_lines(path):
                if line.torn:
                    what = f"the last {line.length} bytes are an unfinished record"
                    yield Finding(path.name, line.offset, f"{what}, never acknowledged", True)
                elif line.names is None:
                    what = f"{line.length} bytes do not fit their checksum"
                    yield Finding(path.name, line.offset, what)
                else:
                    for what in _faults(store, path, line, fingerprint):
                        yield Finding(path.name, line.offset, what)


def _faults(
    store: RecordStore, path: Path, line: Line, fingerprint: Mapping[str, object] | None
) -> Iterator[str]:
    names = line.names
    assert names is not None
    payload = read_record(path, line)["payload"]
    record = f"{names.kind} {names.key}"

    # Of several records with one key, the store returns the one at this location.
    location = store.location(names.key, names.kind)
    is_other_record = location not in (None, (path.name, line.offset))
    if is_other_record and store.get(names.key, names.kind) != payload:
        shard, offset = location
        yield f"{record} differs from the record in use with this key, in {shard} at byte {offset}"

    parent = names.parent
    if parent is not None and not any(store.location(parent, kind) for kind in store.kinds()):
        yield f"{record} is about {parent}, which is not in the store"

    if payload.get("key", names.key) != names.key:
        yield f"{record} holds the payload of {payload['key']}"
    elif fingerprint is not None and not _fits_key(names.key, names.kind, payload, fingerprint):
        yield f"{record} is not the key of its content under the settings in fingerprint.json"


def _fits_key(
    key: str, kind: str, payload: Mapping[str, object], fingerprint: Mapping[str, object]
) -> bool:
    """True if ``Stage1Sampler`` gives this content this key, or if that cannot be derived."""
    role = {SOLUTION: "generator", VERIFICATION: "verifier"}.get(kind)
    fields = ("the grammar", "stage1.prompt_set", f"models.{role}", f"stage1.{role}_sampling")
    if role is None or not {*fields, "run.seed"} <= fingerprint.keys():
        return True
    source = [fingerprint[field] for field in fields]
    seed = fingerprint["run.seed"]
    if kind == VERIFICATION:
        verifier_prompt = fingerprint.get("stage1.verifier_prompt", "verify")
        if verifier_prompt != "verify":
            source.append(verifier_prompt)
        expected = content_key(VERIFICATION, payload["solution_key"], source, seed, payload["vote"])
        return expected == key
    # A solution does not record which of its problem's samples it is.
    return any(
        content_key(SOLUTION, payload["question"], source, seed, index) == key
        for index in range(_MAX_SOLUTION_INDEX)
    )
