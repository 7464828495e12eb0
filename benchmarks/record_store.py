"""Memory and speed of the record store: appending, looking up what is missing, opening and
streaming.

Every size is measured in a process of its own; the memory is its peak, Python included.

    python benchmarks/record_store.py --records 10000 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from spark_nemo.records import content_key
from spark_nemo.records.store import RecordStore

TEXT = "## Step 1: add\n3 + 4 = 7\n**This step is correct.**\n" * 6
VOTES = 3


def main() -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(_measure(arguments.measure, arguments.records[0])))
        return 0
    print(
        "| records | appends/s | missing look-ups/s | RSS writer, MiB | open again, s | read-only open, s | "
        "streamed/s by solution | RSS reader, MiB |\n|---|---|---|---|---|---|---|---|"
    )
    for records in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            row = {}
            for _ in range(2):  # the second process finds the store there and reads it
                done = subprocess.run(
                    [sys.executable, __file__, "--measure", folder, "--records", str(records)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                row.update(json.loads(done.stdout))
        print(
            f"| {records:,} | {row['append']:,.0f} | {row['missing']:,.0f} | {row['writer_rss']:.1f} | "
            f"{row['reopen']:.2f} | {row['open']:.2f} | {row['stream']:,.0f} | {row['reader_rss']:.1f} |",
            flush=True,
        )
    return 0


def _measure(folder: Path, records: int) -> dict[str, float]:
    if any(folder.iterdir()):
        return _measure_reading(folder, records)
    store = RecordStore(folder, "w", fsync_every=256)
    solutions = records // (1 + VOTES)

    def append() -> None:
        for number in range(solutions):
            solution = content_key("solution", number)
            store.append(solution, "solution", {"text": TEXT, "key": solution})
            for vote in range(VOTES):
                key = content_key("verification", number, vote)
                store.append(
                    key, "verification", {"text": TEXT, "solution_key": solution}, parent=solution
                )
        store.flush()

    def look_up() -> None:
        for number in range(10_000):
            assert store.get(content_key("missing", number), "verification") is None

    figures = {"append": records / _seconds(append), "missing": 10_000 / _seconds(look_up)}
    store.close()
    return {
        **figures,
        "reopen": _seconds(lambda: RecordStore(folder, "w").close()),
        "writer_rss": _rss_mib(),
    }


def _measure_reading(folder: Path, records: int) -> dict[str, float]:
    stores = []
    opening = _seconds(lambda: stores.append(RecordStore(folder)))

    def stream() -> None:
        found = 0
        for key, _ in stores[0].iter("solution", by_key=True):
            found += 1 + sum(1 for _ in stores[0].children(key, "verification"))
        assert found == records // (1 + VOTES) * (1 + VOTES)

    return {"open": opening, "stream": records / _seconds(stream), "reader_rss": _rss_mib()}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
