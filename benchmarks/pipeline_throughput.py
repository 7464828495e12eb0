"""Engine utilisation and memory of stage I's sampling pipeline.

The engine is a fake that serves ``--slots`` requests at once, each in ``--latency`` seconds, with
fixed texts in the grammar. Keys, prompts, parsing, vote batches, token accounting and (with
``--store DIR``) the record store are the real ones. Printed:

* share of capacity: the time that slots were taken, over the time that they existed, from the
  second latency until the last new problem was drawn. Lost are the time that a slot is empty while
  the pipeline stores a result and sends the next request, and the delay with which a busy event
  loop notices a finished request.
* CPU seconds per request: its inverse is the highest rate of one process.
* resident memory when each power of ten of solutions was reached, and at the end.

The two questions have different answers on a slow machine, so they are two runs::

    python benchmarks/pipeline_throughput.py                                             # capacity
    python benchmarks/pipeline_throughput.py --latency 0 --votes 2 --solutions 1000000   # memory
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from spark_nemo.config import SamplingConfig, Stage1Config
from spark_nemo.engines.base import (
    Engine,
    EngineHealth,
    FinishReason,
    Generation,
    GenerationRequest,
)
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import render_verification
from spark_nemo.grammar.verification import StepJudgement
from spark_nemo.records import Problem
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.sampler import SamplingCounts, Stage1Sampler

STEPS = 4
SOLUTION = (
    "".join(f"Step {k}: take {k} more, which makes {k + 1}.\n" for k in range(1, STEPS + 1))
    + "Answer: 9"
)
VERIFICATIONS = [
    render_verification(
        [StepJudgement("", "Recomputed.", k != wrong) for k in range(STEPS)], wrong == STEPS
    )
    for wrong in range(STEPS + 1)
]
TEXTS = [SOLUTION, *VERIFICATIONS]
TOKENS_PER_TEXT = 64
SOLVE, VERIFY = SamplingConfig(max_new_tokens=100), SamplingConfig(max_new_tokens=200)


class CannedTokenizer:
    """The first token of a response names its text."""

    eos_ids = (99,)

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """Return as many tokens as a short chat has."""
        return tuple(range(min(64, len(messages[0]["content"]))))

    def decode_response(self, ids: tuple[int, ...]) -> str:
        """Return the text itself."""
        return TEXTS[ids[0]]


class SlottedEngine(Engine):
    """Engine with a fixed number of slots and one latency; sums up the time its slots are taken."""

    def __init__(self, slots: int, latency: float) -> None:
        self.requests = self._in_flight = 0
        self._slots, self._latency = asyncio.Semaphore(slots), latency
        self._busy = 0.0
        self._since = time.monotonic()

    async def generate(self, request: GenerationRequest) -> Generation:
        """One of the canned texts, drawn by the seed."""
        async with self._slots:
            self.busy_seconds(+1)
            end = self._since + self._latency
            await asyncio.sleep(self._latency)
            self.busy_seconds(-1)
            self._busy -= max(0.0, self._since - end)  # done by then, and only not noticed
        self.requests += 1
        vote = request.sampling.max_new_tokens == VERIFY.max_new_tokens
        # Three of four verifications find every step right.
        pick = 0 if not vote else max(1, (STEPS + 1) - max(0, request.sampling.seed % 16 - 11))
        ids = (pick,) * TOKENS_PER_TEXT
        return Generation(ids, (0.0,) * len(ids), (0,) * len(ids), FinishReason.STOP)

    def busy_seconds(self, change: int = 0) -> float:
        """Slot-seconds in use so far."""
        now = time.monotonic()
        self._busy += self._in_flight * (now - self._since)
        self._since, self._in_flight = now, self._in_flight + change
        return self._busy

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Not for a fake."""

    async def pause(self) -> None:
        """Not for a fake."""

    async def resume(self) -> None:
        """Not for a fake."""

    async def health(self) -> EngineHealth:
        """Always well."""
        return EngineHealth(True, False, self._in_flight, 0, 0, self.requests * TOKENS_PER_TEXT)

    async def close(self) -> None:
        """Nothing to release."""


class NullStore:
    """Holds nothing: the pipeline alone."""

    def get(self, key: str, kind: str) -> None:
        """Never there."""

    def append(
        self, key: str, kind: str, payload: dict[str, object], *, parent: str | None = None
    ) -> bool:
        """Discard the record."""
        return True


class Meter:
    """Measurements while the pipeline runs."""

    def __init__(self, engine: SlottedEngine, problems: int, warm_up: float) -> None:
        self._engine, self._problems, self._warm_up = engine, problems, warm_up
        self._next_report = 1000
        self._start = time.monotonic()
        self._first: tuple[float, float] | None = None
        self.steady: tuple[float, float] | None = None
        """Seconds and slot-seconds from the end of the warm-up to the last new problem."""

    def problems(self) -> Iterator[Problem]:
        """Drawn by the pipeline, made on the way."""
        for number in range(self._problems):
            if self._first is None and time.monotonic() - self._start > self._warm_up:
                self._first = time.monotonic(), self._engine.busy_seconds()
            yield Problem(f"p{number}", f"What is {number} and ten more?")
        if self._first is not None:
            self.steady = (
                time.monotonic() - self._first[0],
                self._engine.busy_seconds() - self._first[1],
            )

    def __call__(self, counts: SamplingCounts) -> None:
        """Report memory at each power of ten."""
        if counts.solutions >= self._next_report:
            print(
                f"{counts.solutions:>10,} solutions {resident_mib():>8.1f} MiB resident "
                f"{time.monotonic() - self._start:>8.1f} s",
                flush=True,
            )
            self._next_report *= 10


def resident_mib() -> float:
    """Resident memory of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@contextmanager
def open_store(folder: Path | None) -> Iterator[RecordStore | NullStore]:
    """The real store in a new folder under ``folder``, removed afterwards, or none."""
    if folder is None:
        yield NullStore()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        RecordStore(Path(scratch) / "store", writer_name="benchmark", fsync_every=256) as store,
    ):
        yield store


def main() -> None:
    """Run once and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds of every request")
    parser.add_argument("--solutions", type=int, default=2000, help="four to a problem")
    parser.add_argument("--votes", type=int, default=16)
    parser.add_argument("--early-stop", choices=("none", "exact", "sequential"), default="none")
    parser.add_argument("--store", type=Path, help="folder for a real record store")
    arguments = parser.parse_args()
    config = Stage1Config(
        solutions_per_problem=4,
        verifications_per_solution=arguments.votes,
        prompt_set="compact",
        generator_sampling=SOLVE,
        verifier_sampling=VERIFY,
        early_stop=arguments.early_stop,
        early_stop_error=0.05 if arguments.early_stop == "sequential" else None,
    )
    engine = SlottedEngine(arguments.slots, arguments.latency)
    served = ServedModel(engine, CannedTokenizer(), "canned")
    meter = Meter(engine, arguments.solutions // 4, 2 * arguments.latency)
    gc.collect()
    print(f"{'before':>20} {resident_mib():>8.1f} MiB resident")
    with open_store(arguments.store) as store:
        collector = Stage1Sampler(config, 0, served, served, store, meter)
        wall, cpu = time.monotonic(), time.process_time()
        counts = asyncio.run(collector.run(meter.problems(), arguments.slots))
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        print(
            f"{counts.solutions:>10,} solutions {resident_mib():>8.1f} MiB resident {wall:>8.1f} s, the end"
        )
    print(
        f"{engine.requests:,} requests in {wall:.1f} s, CPU {cpu:.1f} s: {1e6 * cpu / engine.requests:.0f} us each, "
        f"{engine.requests / cpu:,.0f} requests per CPU second"
    )
    if arguments.latency and meter.steady is not None:
        seconds, busy = meter.steady
        print(
            f"share of the engine's capacity over {seconds:.1f} s: {busy / (seconds * arguments.slots):.1%} "
            f"({arguments.slots / arguments.latency:,.0f} requests/s are 100 %)"
        )


if __name__ == "__main__":
    main()
