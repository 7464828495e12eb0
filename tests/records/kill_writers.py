"""Kills forked writers of one store at random places and prints, as JSON, what they had
acknowledged.

    python kill_writers.py FOLDER KILLS SEED

A process of its own, so that the forks come from an interpreter without other threads. Three ways
to die, by turns: after an exact number of bytes of a shard were written, inside an SQLite statement
of the index, and at a random moment chosen from outside. All writers have one name: each resumes
from the index that the one before left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from spark_nemo.records import store as store_module
from spark_nemo.records.store import RecordStore

SIZES = (1, 20, 2000)
REAL_WRITE = os.write
WAYS = ("byte", "byte", "statement", "byte", "byte", "moment")


def die_after_bytes(count: int) -> None:
    """Kill the process after it has written ``count`` bytes, even in the middle of a line."""
    left = [count]

    def write(handle: int, data: bytes) -> int:
        if len(data) > left[0]:
            REAL_WRITE(handle, bytes(data[: left[0]]))
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= len(data)
        return REAL_WRITE(handle, data)

    os.write = write


def writer(folder: str, name: str, way: str, draw: random.Random, acknowledge: int) -> None:
    """Append until killed, telling each key once ``append`` has returned."""
    # Commit the index as often as the shard, or rarely.
    store_module._COMMIT_EVERY = draw.choice([1, 3, 50])
    if way == "byte":
        die_after_bytes(draw.randrange(12_000))
    with RecordStore(folder, "w", fsync_every=draw.choice([1, 5])) as store:
        if way == "statement":
            after = [draw.randrange(1, 3000)]

            def count_down() -> None:
                after[0] -= 1
                if after[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            store._index._database.set_progress_handler(count_down, 1)
        for number in range(100_000):
            key = f"{name}-{number}"
            store.append(
                key, "vote", {"text": key * draw.choice(SIZES)}, parent=f"{name}-{number // 3}"
            )
            REAL_WRITE(acknowledge, f"{key}\n".encode())


def kill_one(folder: str, number: int, seed: int) -> tuple[str, list[str]]:
    """Fork a writer and see it die; the way and the keys that it acknowledged."""
    draw = random.Random(f"{seed}-{number}")
    way = WAYS[number % len(WAYS)]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        writer(folder, f"c{number}", way, draw, writing)
        os._exit(1)
    os.close(writing)
    first_byte = b""
    if way == "moment":
        # Start the clock at the first record: on a busy machine opening the store takes longer.
        first_byte = os.read(reading, 1)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as pipe:
        told = (first_byte + pipe.read()).decode()
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise RuntimeError(f"writer {number} ({way}) was not killed: status {status}")
    return way, told.split("\n")[:-1]


def main(folder: str, kills: int, seed: int) -> None:
    """Every hundredth time the index is damaged too, so that the next writer makes it again."""
    keys: list[str] = []
    acknowledged: dict[str, int] = {}
    for number in range(kills):
        way, told = kill_one(folder, number, seed)
        keys += told
        acknowledged[way] = acknowledged.get(way, 0) + len(told)
        if number % 100 == 99:
            (path,) = Path(folder).glob(".index/w@*.sqlite")
            os.truncate(path, os.path.getsize(path) // 2)
    print(json.dumps({"kills": kills, "keys": keys, "acknowledged": acknowledged}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
