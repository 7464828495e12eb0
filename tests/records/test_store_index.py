"""The index of the record store: a cache on disk that may be lost, damaged or another's without
consequence.
"""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from spark_nemo.records import store as store_module
from spark_nemo.records.index import StoreIndex
from spark_nemo.records.store import RecordStore, StoreFull

MEMORY = """
import resource, sys
from spark_nemo.records.store import RecordStore
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
records = int(sys.argv[2])
with RecordStore(sys.argv[1], "w", fsync_every=4096) as store:
    for number in range(records):
        store.append(f"{number * 2654435761 % 2**32:08x}", "vote", {"n": number})
print(peak())
"""


def fill(folder, writer="w", count=20):
    with RecordStore(folder, writer) as store:
        for number in range(count):
            store.append(f"s{number}", "solution", {"n": number})
            store.append(f"v{number}", "vote", {"n": number}, parent=f"s{number // 2}")


def reopened(folder, writer="w"):
    """A writer opened again, with how many lines it had to read."""
    lines, real = [], store_module.read_lines

    def counting(path, start=0):
        for line in real(path, start):
            lines.append(line)
            yield line

    store_module.read_lines = counting
    try:
        return RecordStore(folder, writer), len(lines)
    finally:
        store_module.read_lines = real


def test_a_writer_resumes_from_its_index_without_reading_the_shards(tmp_path):
    """No line is read again; records that another writer added since are read, and only those."""
    fill(tmp_path)
    store, read = reopened(tmp_path)
    assert read == 0 and len(store.keys("vote")) == 20
    store.close()
    fill(tmp_path, "x", 25)
    store, read = reopened(tmp_path)
    assert read == 10 and len(store.keys("vote")) == 25


def damage_header(path):
    path.write_bytes(b"not a database" + path.read_bytes()[14:])


def damage_half(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_format(path):
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=999")
    database.close()


def damage_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [damage_header, damage_half, damage_format, damage_empty, os.unlink]
)
def test_an_index_that_cannot_be_used_is_made_again(tmp_path, damage):
    """Whatever is wrong with the file: the same keys are found, by reading every line once, and
    kept for the next.
    """
    fill(tmp_path)
    (path,) = tmp_path.glob(".index/w@*.sqlite")
    damage(path)
    store, read = reopened(tmp_path)
    assert read == 40 and store.get("v19", "vote") == {"n": 19}
    store.close()
    assert reopened(tmp_path)[1] == 0


def test_an_index_of_other_shards_is_not_believed(tmp_path):
    """A shard cut short, gone or replaced since: the index says where records were, so it is made
    again.
    """
    fill(tmp_path / "a")
    fill(tmp_path / "b", count=25)
    for change in ("cut", "gone", "replaced"):
        folder = shutil.copytree(tmp_path / "a", tmp_path / change)
        path = folder / "w.000000.records"
        if change == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif change == "gone":
            path.unlink()
        else:
            shutil.copy(tmp_path / "b/w.000000.records", path)
        assert RecordStore(folder, "w").keys("vote") == RecordStore(folder).keys("vote")


def test_a_second_opener_of_the_same_name_gets_an_index_of_its_own(tmp_path):
    """Both write, neither waits, and the file belongs to the first until that lets go."""
    with RecordStore(tmp_path, "w") as first, RecordStore(tmp_path, "w") as second:
        assert first.append("a", "vote", {}) and second.append("b", "vote", {})
        second.refresh()
        assert second.keys("vote") == {"a", "b"} and not second.append("a", "vote", {})
        assert first._index.path is not None and second._index.path is None
    with RecordStore(tmp_path, "w") as third:
        assert third._index.path is not None and third.keys("vote") == {"a", "b"}


def test_a_reader_writes_nothing_into_the_folder(tmp_path):
    """Also where it must not: a folder without the right to write can be read."""
    fill(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert len(RecordStore(tmp_path).keys("vote")) == 20
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_index_that_fails_at_work_costs_no_record(tmp_path, monkeypatch):
    """The index file's disk fills up while records still fit: a temporary index takes over,
    unnoticed but for a log line. Where even that cannot be written the error is ``StoreFull`` and
    the record is in the shard.
    """
    real, failing = StoreIndex.add, [True]

    def add(self, records):
        if failing[0] and (self.path is not None or failing[0] == "always"):
            raise sqlite3.OperationalError("database or disk is full")
        real(self, records)

    monkeypatch.setattr(StoreIndex, "add", add)
    with RecordStore(tmp_path, "w") as store:
        assert store.append("a", "vote", {"n": 1}) and store.append("b", "vote", {"n": 2})
        assert store.get("a") == {"n": 1} and store.keys("vote") == {"a", "b"}
        failing[0] = "always"
        with pytest.raises(StoreFull, match="SQLITE_TMPDIR"):
            store.append("c", "vote", {"n": 3})
        failing[0] = False
        assert store.keys("vote") == {"a", "b", "c"}
    assert RecordStore(tmp_path).keys("vote") == {"a", "b", "c"}


def test_children_are_found_by_the_parent_they_name(tmp_path):
    """By key, of one kind, from the shard or this store's own appends; ``parent`` tells the way
    back.
    """
    draw = random.Random(1)
    numbers = draw.sample(range(60), 60)
    with RecordStore(tmp_path, "w") as store:
        for number in numbers:
            store.append(f"v{number:02d}", "vote", {"n": number}, parent=f"s{number % 3}")
        store.append("c", "critique", {}, parent="s1")
        for found in (store, RecordStore(tmp_path)):
            assert [key for key, _ in found.children("s1", "vote")] == [
                f"v{n:02d}" for n in range(1, 60, 3)
            ]
            assert [key for key, _ in found.children("s1", "critique")] == ["c"]
            assert list(found.children("none", "vote")) == [] == list(found.children("s1", "none"))
            assert found.parent("v07", "vote") == "s1" and found.parent("v7", "vote") is None
        store.append("v99", "vote", {"n": 99}, parent="s1")
        assert [key for key, _ in store.children("s1", "vote")][-1] == "v99"


def test_streams_come_in_the_order_asked_for(tmp_path):
    """In the order written, or by key, over many pages; records appended meanwhile do not join the
    stream.
    """
    keys = [f"{number:05d}" for number in random.Random(0).sample(range(3000), 3000)]
    with RecordStore(tmp_path, "w", fsync_every=1000) as store:
        for key in keys:
            store.append(key, "vote", {"key": key})
        stream = store.iter("vote")
        first = next(stream)
        store.append("late", "vote", {})
        assert [key for key, _ in (first, *stream)] == keys
        assert [key for key, _ in store.iter("vote", by_key=True)] == [*sorted(keys), "late"]
        assert store.keys_with_prefix("vote", "0012", 4) == [f"0012{n}" for n in range(4)]
        assert store.counts() == {("w.000000.records", "vote"): 3001} and store.kinds() == ["vote"]


@pytest.mark.parametrize(
    "walk",
    [
        lambda index: index.in_order_read("vote"),
        lambda index: index.in_key_order("vote"),
    ],
    ids=["order read", "key order"],
)
def test_four_times_the_records_are_four_times_the_work(tmp_path, walk):
    """Counted in SQLite's own steps, so no clock is asked: a page must not cost more the more
    records there are.
    """
    steps = {}
    for count in (5_000, 20_000):
        index = StoreIndex(tmp_path / f"{count}.sqlite")
        shard = index.add_shard("w.000000.records").id
        index.add(
            ("vote", f"{number * 2654435761 % 2**32:08x}", None, shard, number, 1)
            for number in range(count)
        )
        ticks = []
        index._database.set_progress_handler(lambda ticks=ticks: ticks.append(1), 100)
        assert sum(1 for _ in walk(index)) == count
        steps[count] = len(ticks)
        index.close()
    assert steps[20_000] < 5 * steps[5_000], steps


def test_a_stream_of_a_closed_store_says_so(tmp_path):
    """Places belong to one index: a stream that outlives it stops with an error and not with other
    records.
    """
    fill(tmp_path)
    store = RecordStore(tmp_path, "w")
    stream = store.iter("vote")
    next(stream)
    store.close()
    with pytest.raises(RuntimeError, match="read it again"):
        next(stream)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_records(tmp_path):
    """Peak memory of a writer of 80,000 records is within a fifth of that for 10,000, in a process
    with nothing else.

    A million are in ``benchmarks/record_store.py``; an index in memory would have added half as
    much again here.
    """
    peaks = []
    for records in (10_000, 80_000):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / str(records)), str(records)],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.2 * peaks[0], peaks
