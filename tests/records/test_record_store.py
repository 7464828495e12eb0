"""The record store: what was acknowledged is there, whatever happens to the writer or the disk."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from spark_nemo.records.store import RecordStore, StoreFull

KILLS = 300

WRITER = """
import random, sys
from spark_nemo.records.store import RecordStore, StoreFull
folder, name, count, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
assert "torch" not in sys.modules
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
draw = random.Random(name)
with RecordStore(folder, name) as store:
    for number in range(count):
        key = f"{name}-{number}"
        try:
            store.append(key, "vote", {"text": key * draw.choice([1, 20, 5000])})
        except StoreFull as error:
            print("full", error, flush=True)
            sys.exit(3)
        print(key, flush=True)
"""


def start_writer(folder, name, count, limit=0):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(count), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def shard_of(folder, writer):
    (path,) = Path(folder).glob(f"{writer}.*")
    return path


def assert_intact(folder, acknowledged):
    """Every acknowledged key is there, and every record there is what its writer wrote."""
    store = RecordStore(folder)
    assert store.corrupt_records == 0
    records = dict(store.iter("vote"))
    assert set(acknowledged) <= set(records) == store.keys("vote")
    for key, payload in records.items():
        assert payload["text"] == key * (len(payload["text"]) // len(key))
    return store


def test_appended_records_come_back_after_reopening(tmp_path):
    """Payloads of any JSON text survive, by key, by kind and in order; unknown keys are None."""
    payloads = {
        "a": {"text": "é\n\t\u2028\U0001f600\x00"},
        "b": {"n": [1, 2.5, None, True], "kind": "x"},
        'c"\\é': {},
    }
    with RecordStore(tmp_path, "w") as store:
        assert all(store.append(key, "solution", payload) for key, payload in payloads.items())
        assert store.append("a", "label", {"other": 1})
    for reader in (store, RecordStore(tmp_path)):
        assert dict(reader.iter("solution")) == payloads and list(
            dict(reader.iter("solution"))
        ) == list(payloads)
        assert reader.keys("solution") == set(payloads) and reader.keys("none") == set()
        assert reader.get("a") == payloads["a"] and reader.get("a", "label") == {"other": 1}
        assert reader.get("zzz") is None and reader.get("b", "label") is None


def test_the_first_record_of_a_key_wins(tmp_path):
    """Appending a key again writes nothing; of two writers' records, one is read, once."""
    with RecordStore(tmp_path, "b") as second, RecordStore(tmp_path, "a") as first:
        assert first.append("k", "vote", {"from": "a"}) and not first.append(
            "k", "vote", {"from": "a again"}
        )
        assert second.append("k", "vote", {"from": "b"})
    assert list(RecordStore(tmp_path).iter("vote")) == [("k", {"from": "a"})]


@pytest.mark.slow
def test_killed_writers_lose_nothing_acknowledged(tmp_path):
    """300 writers killed by SIGKILL, 200 of them after an exact, random number of bytes of the
    write path, 50 inside a statement of the index and 50 at a random moment: every acknowledged
    record is there, none is corrupt, and the index that outlived them all (damaged three times on
    the way) knows what a reader finds in the shards.

    A killed process, not a lost machine: that fsync reaches the platter is the kernel's promise,
    not shown here.
    """
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "kill_writers.py", tmp_path, str(KILLS), "0"],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    result = json.loads(done.stdout)
    assert result["kills"] == KILLS and min(result["acknowledged"].values()) > 20
    reader = assert_intact(tmp_path, result["keys"])
    assert reader.torn_tails > 50
    with RecordStore(tmp_path, "w") as resumed:
        assert resumed.keys("vote") == reader.keys("vote")
        for key in result["keys"][::50]:
            assert resumed.get(key) == reader.get(key) and not resumed.append(key, "vote", {})


def test_every_truncation_gives_the_complete_prefix(tmp_path):
    """A shard cut at any byte has exactly the records whose lines are whole, and a new writer goes
    on safely.
    """
    with RecordStore(tmp_path / "whole", "w") as store:
        for number in range(4):
            store.append(f"k{number}", "vote", {"n": number, "text": "é\n" * number})
    data = shard_of(tmp_path / "whole", "w").read_bytes()
    cut_folder = tmp_path / "cut"
    for cut in range(len(data) + 1):
        cut_folder.mkdir()
        (cut_folder / "w.000000.records").write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        reader = RecordStore(cut_folder)
        assert reader.keys("vote") == {f"k{number}" for number in range(whole)}
        assert reader.corrupt_records == 0 and reader.torn_tails == (
            not data[:cut].endswith(b"\n") and cut > 0
        )
        if cut % 10 == 0:
            with RecordStore(cut_folder, "w") as writer:
                writer.append("new", "vote", {"n": 9})
            assert RecordStore(cut_folder).keys("vote") == reader.keys("vote") | {"new"}
        shutil.rmtree(cut_folder)


def test_a_damaged_byte_costs_one_record(tmp_path, caplog):
    """Any single byte changed anywhere (a newline too) loses at most one record, and never changes
    one.
    """
    with RecordStore(tmp_path, "w") as store:
        for number in range(3):
            store.append(f"k{number}", "vote", {"n": number})
    path = shard_of(tmp_path, "w")
    data, whole = path.read_bytes(), dict(store.iter("vote"))
    for position in range(len(data)):
        for damage in (b"\n", b"\t", b"0", bytes([data[position] ^ 1])):
            path.write_bytes(data[:position] + damage + data[position + 1 :])
            reader = RecordStore(tmp_path)
            found = dict(reader.iter("vote"))
            assert found.items() <= whole.items() and len(found) >= 2
            assert reader.corrupt_records + reader.torn_tails >= len(whole) - len(found)
    caplog.clear()
    second = data.index(b"\n") + 1
    path.write_bytes(data[: second + 20] + b"#" + data[second + 21 :])
    with caplog.at_level(logging.WARNING):
        assert RecordStore(tmp_path).corrupt_records == 1
    assert f"{path}: byte {second}: " in caplog.text


def test_damage_after_opening_is_noticed_on_reading(tmp_path):
    """The checksum is looked at again on reading; the key is then free to be written once more."""
    with RecordStore(tmp_path, "w") as store:
        for key in ("by get", "by iter"):
            store.append(key, "vote", {"n": 1})
        path = shard_of(tmp_path, "w")
        path.write_bytes(path.read_bytes().replace(b'"n": 1', b'"n": 2'))
        assert (
            store.get("by get") is None
            and list(store.iter("vote")) == []
            and store.corrupt_records == 2
        )
        assert store.append("by get", "vote", {"n": 3}) and store.append(
            "by iter", "vote", {"n": 3}
        )
    assert dict(RecordStore(tmp_path).iter("vote")) == {"by get": {"n": 3}, "by iter": {"n": 3}}


@pytest.mark.slow
def test_concurrent_writers_produce_the_union(tmp_path):
    """Four processes, two of them under one name, write at once without locks and without losing a
    record.
    """
    names = ["a", "b", "c", "c"]
    children = [start_writer(tmp_path, name, 60) for name in names]
    acknowledged = [line for child in children for line in child.communicate()[0].split()]
    assert [child.returncode for child in children] == [0] * 4
    assert set(acknowledged) == {f"{name}-{number}" for name in "abc" for number in range(60)}
    assert len(assert_intact(tmp_path, acknowledged).keys("vote")) == 180
    # One shard per process that wrote; on a slow machine the second "c" may come when all its keys
    # are there already.
    assert len(list(tmp_path.glob("*.records"))) in (3, 4)


def test_refresh_sees_what_others_added(tmp_path):
    """A store opened early picks up records, shards and a line that was half written at the first
    look.
    """
    with RecordStore(tmp_path, "w") as writer:
        reader = RecordStore(tmp_path)
        writer.append("a", "vote", {})
        path = shard_of(tmp_path, "w")
        line = path.read_bytes()
        path.write_bytes(line + line[:7])
        reader.refresh()
        assert reader.keys("vote") == {"a"} and reader.torn_tails == 1
        path.write_bytes(line)
        writer.append("b", "vote", {"x": 1})
        reader.refresh()
        assert (
            reader.keys("vote") == {"a", "b"}
            and reader.torn_tails == 0
            and reader.get("b") == {"x": 1}
        )


@pytest.mark.slow
def test_a_file_size_limit_is_store_full(tmp_path):
    """The kernel writes a piece of a record and fails: the writer truncates it and reports it."""
    child = start_writer(tmp_path, "w", 10_000, limit=300_000)
    lines = child.communicate()[0].splitlines()
    assert child.returncode == 3 and lines[-1].startswith("full ") and str(tmp_path) in lines[-1]
    store = assert_intact(tmp_path, lines[:-1])
    assert store.keys("vote") == set(lines[:-1]) and store.torn_tails == 0


@pytest.mark.slow
def test_a_full_disk_is_store_full(tmp_path):
    """On a full file system acknowledged records are intact; writing continues with free space."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        ballast = tmp_path / "ballast"
        ballast.write_bytes(b"x" * 30_000)
        store, acknowledged = RecordStore(tmp_path / "store", "w"), []
        with pytest.raises(StoreFull, match="free space"):
            for number in range(1000):
                store.append(f"k{number}", "vote", {"text": f"k{number}" * 500})
                acknowledged.append(f"k{number}")
        assert acknowledged
        assert_intact(tmp_path / "store", acknowledged)
        ballast.unlink()
        assert store.append("late", "vote", {"text": "late"})
        store.close()
        assert_intact(tmp_path / "store", [*acknowledged, "late"])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("can_truncate", [True, False])
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, can_truncate):
    """A partial write is taken back; where even that fails, the writer leaves the shard and opens a
    fresh one.
    """
    store = RecordStore(tmp_path, "w")
    store.append("a", "vote", {"text": "a"})
    write, calls = os.write, []

    def failing_write(handle, data):
        calls.append(len(data))
        if len(calls) == 1:
            return write(handle, bytes(data[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    def failing_truncate(handle, length):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", failing_write)
    if not can_truncate:
        monkeypatch.setattr(os, "ftruncate", failing_truncate)
    with pytest.raises(StoreFull) as caught:
        store.append("b", "vote", {"text": "b"})
    assert (
        str(tmp_path) in str(caught.value)
        and str(calls[0]) in str(caught.value)
        and "\n" not in str(caught.value)
    )
    monkeypatch.undo()
    assert store.append("b", "vote", {"text": "b"}) and store.append("c", "vote", {"text": "c"})
    store.close()
    reader = assert_intact(tmp_path, ["a", "b", "c"])
    assert (len(list(tmp_path.glob("*.records"))), reader.torn_tails) == (
        (1, 0) if can_truncate else (2, 1)
    )


def test_records_lost_in_a_failed_sync_can_be_appended_again(tmp_path, monkeypatch):
    """After a failed fsync the unsettled keys are forgotten, so that a retry writes them to a new
    shard.
    """
    store = RecordStore(tmp_path, "w", fsync_every=10)
    store.append("a", "vote", {"text": "a"})

    def failing_fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError, match="1 records"):
        store.flush()
    monkeypatch.undo()
    assert store.keys("vote") == set()
    assert store.append("a", "vote", {"text": "a"})
    store.close()
    assert_intact(tmp_path, ["a"])


def test_fsync_policy(tmp_path, monkeypatch):
    """One sync per record, or per ``fsync_every`` records and at the end."""
    syncs = []
    for every in (1, 4):
        store = RecordStore(tmp_path / str(every), "w", fsync_every=every)
        store.append("first", "vote", {})
        monkeypatch.setattr(os, "fsync", syncs.append)
        for number in range(10):
            store.append(str(number), "vote", {})
        store.close()
        monkeypatch.undo()
        assert len(syncs) == {1: 10, 4: 3}[every]
        syncs.clear()


def test_misuse_is_refused(tmp_path):
    """Each misuse is one line that names what was wrong."""
    for call, error, match in [
        (lambda: RecordStore(tmp_path / "typo"), FileNotFoundError, "typo"),
        (lambda: RecordStore(tmp_path, "a/b"), ValueError, "a/b"),
        (lambda: RecordStore(tmp_path, "w", fsync_every=0), ValueError, "fsync_every"),
        (lambda: RecordStore(tmp_path).append("k", "vote", {}), ValueError, "reading only"),
        (lambda: RecordStore(tmp_path, "w").append("", "vote", {}), ValueError, "key"),
        (
            lambda: RecordStore(tmp_path, "w").append("k", "vote", {"x": float("nan")}),
            ValueError,
            "JSON",
        ),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert list(tmp_path.glob("*.records")) == []


def test_record_line_is_checksum_tab_json(tmp_path):
    """The file can be read without this code: zlib's CRC-32 in hex, a tab, one JSON object."""
    with RecordStore(tmp_path, "w") as store:
        store.append("k", "vote", {"text": "é"})
    checksum, body = shard_of(tmp_path, "w").read_bytes().rstrip(b"\n").split(b"\t")
    assert int(checksum, 16) == zlib.crc32(body)
    assert json.loads(body) == {"key": "k", "kind": "vote", "payload": {"text": "é"}}
