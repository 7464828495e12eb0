"""Find slow or broken nodes; one task per node.

Nodes exchange data in pairs, three times with other partners. A slow node is slow with every
partner; its partners are slow only with it. Each node is therefore judged by its best exchange. On
nodes with GPUs each GPU is also timed on a matrix product. Rank 0 prints one line per node and,
last, the --exclude list; the status is 1 when there is one. Called by preflight.sh --collective.
"""

from __future__ import annotations

import datetime
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

MEGABYTES = 64
ROUNDS = 3
SLOW_FACTOR = 3.0
"""Times slower than the median node from which on a node is reported."""
WAIT = datetime.timedelta(seconds=60)
JOIN = datetime.timedelta(seconds=600)
"""Longest delay of a node after the first: nodes unpack containers and read environments at
different speeds.
"""
NEVER = float("inf")


def main() -> int:
    """Measure this node; on rank 0 also collect and judge."""
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, rank == 0, JOIN, False
    )
    node = os.environ["SLURMD_NODENAME"]
    store.set(f"name/{rank}", node)  # also of one that a broken exchange takes down
    # NCCL's watchdog ends the whole process of an exchange that does not end; waiting here is an
    # error that is caught.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    seconds = [
        exchange(store, number, *sorted((rank, partner)), rank)
        for number, pairs in enumerate(schedule(size))
        if (partner := pairs.get(rank)) is not None
    ]
    store.set(f"node/{rank}", f"{node} {min(seconds, default=NEVER)} {slowest_gpu()}")
    if rank != 0:
        store.wait(
            ["verdict"], (ROUNDS + 2) * WAIT
        )  # as long as rank 0 waits for the slowest, and some
        return 0
    found = [collect(store, number) for number in range(size)]
    bad = judge(found)
    for name, network, compute in found:
        rate = f"{MEGABYTES / network:8.0f} MB/s" if network < NEVER else "no exchange"
        gpu = f", slowest GPU {1e3 * compute:.1f} ms" if compute else ""
        print(f"{name:<20} {rate}{gpu}{'   <-- slow or broken' if name in bad else ''}")
    print(
        f"--exclude={','.join(sorted(bad))}" if bad else "every node is as fast as the others",
        flush=True,
    )
    store.set("verdict", "said")
    time.sleep(1)  # the others read it before the store goes with this process
    return 1 if bad else 0


def schedule(size: int) -> list[dict[int, int]]:
    """Partners by rank in each round; no pair meets twice, with an odd size one rank rests (the
    circle method).
    """
    ranks: list[int | None] = list(range(size)) + ([None] if size % 2 else [])
    rounds = []
    for _ in range(min(ROUNDS, len(ranks) - 1)):
        pairs = {}
        for a, b in zip(ranks[: len(ranks) // 2], reversed(ranks[len(ranks) // 2 :]), strict=True):
            if a is not None and b is not None:
                pairs[a], pairs[b] = b, a
        rounds.append(pairs)
        ranks = [ranks[0], ranks[-1], *ranks[1:-1]]
    return rounds


def exchange(store: dist.Store, number: int, low: int, high: int, rank: int) -> float:
    """Seconds for MEGABYTES both ways between two ranks, after a warm-up; never, when it does not
    work.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    data = torch.ones(MEGABYTES * 2**20 // 4, device=device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"{number}/{low}-{high}", store),
            rank=int(rank == high),
            world_size=2,
            timeout=WAIT,
        )
        dist.all_reduce(data[:1024])
        started = time.perf_counter()
        dist.all_reduce(data)
        data[:1].cpu()  # waits for the device
        seconds = time.perf_counter() - started
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as error:
        print(f"rank {rank}, exchange {low}-{high}: {str(error).splitlines()[0]}", file=sys.stderr)
        return NEVER
    return seconds


def slowest_gpu() -> float:
    """Seconds of a matrix product on the slowest GPU of this node; 0 without GPUs."""
    worst = 0.0
    for index in range(torch.cuda.device_count()):
        a = torch.randn(8192, 8192, device=torch.device("cuda", index), dtype=torch.bfloat16)
        for _ in range(3):
            torch.cuda.synchronize(index)
            started = time.perf_counter()
            a @ a
            torch.cuda.synchronize(index)
        worst = max(worst, time.perf_counter() - started)
    return worst


def collect(store: dist.Store, rank: int) -> tuple[str, float, float]:
    """Node, seconds of its best exchange, seconds of its slowest GPU."""
    try:
        store.wait([f"node/{rank}"], (ROUNDS + 1) * WAIT)
    except (RuntimeError, dist.DistError):
        return store.get(f"name/{rank}").decode(), NEVER, 0.0
    node, network, compute = store.get(f"node/{rank}").decode().split()
    return node, float(network), float(compute)


def judge(found: list[tuple[str, float, float]]) -> set[str]:
    """Nodes whose best exchange, or slowest GPU, is far slower than the median node's."""
    bad = set()
    for index in (1, 2):
        median = statistics.median_low([row[index] for row in found])
        bad |= {
            row[0] for row in found if row[index] == NEVER or row[index] > SLOW_FACTOR * median > 0
        }
    return bad


if __name__ == "__main__":
    sys.exit(main())
