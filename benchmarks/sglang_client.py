"""Requests/s of our SGLang client, of a plain asyncio + aiohttp loop and of SGLang's own bench
client, on one server.

    python benchmarks/sglang_client.py --sglang-python ENV/bin/python         # starts a real CPU server
    python benchmarks/sglang_client.py --sglang-python ENV/bin/python --url http://127.0.0.1:30000
    python benchmarks/sglang_client.py --sglang-python ENV/bin/python --fake   # client overhead alone

All three send the same kind of work to the same server: prompts of ``--prompt-tokens`` ids
(consecutive, from a random offset, as SGLang's ``random-ids`` makes them), exactly ``--new-tokens``
new tokens, log-probabilities, no stream, ``--in-flight`` requests at once, an empty prefix cache at
the start. Repeats alternate; medians are printed and the ratio of ours to the better of the others.
The target is 0.95.

What differs, because it is how each is used: ours validates every request and reply (ids, one
log-probability and one weight version per token) and keeps connections; the loop parses JSON and
counts tokens; the bench client opens a connection per request, does not look at log-probabilities,
and times itself after its imports. On a CPU the real server is the bottleneck by far, so there the
figure says only that nothing is lost on the way; ``--fake`` answers at once from another process
and shows what a client costs, which is the stricter figure and not the target's. CPU seconds are
this process's, so they exist for the first two only.

What is imported before the first run is frozen for the garbage collector, for both clients of this
process: it would otherwise walk the objects of torch now and then, at 0.07 CPU ms per request of
ours and 0.01 of the loop's, whose replies it has less to track of. The stages do the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
from aiohttp import web
from serve_batch import generate_all

from spark_nemo.engines import GenerationRequest, SamplingParams
from spark_nemo.engines.async_utils import freeze_heap
from spark_nemo.engines.sglang import SglangServer
from spark_nemo.toy.resolve import ASSETS

START_TIMEOUT_S = 240
OURS, PLAIN, BENCH = "ours", "plain loop", "sglang bench"


class Run(NamedTuple):
    """One client's run: wall seconds, CPU seconds of this process (None for a child's), requests
    and tokens.
    """

    seconds: float
    cpu_seconds: float | None
    requests: int
    tokens: int


def options() -> argparse.Namespace:
    """The defaults take about four minutes with a real server on two shared cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sglang-python", help="interpreter with sglang: the server's and the bench client's"
    )
    parser.add_argument("--url", help="an SGLang server that is up, without an API key")
    parser.add_argument("--fake", action="store_true", help="a server that answers at once")
    parser.add_argument("--serve-fake", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument(
        "--model", type=Path, default=ASSETS / "generator", help="folder; its tokenizer is read too"
    )
    sizes = {"in-flight": 256, "requests": 512, "prompt-tokens": 32, "new-tokens": 64, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def build_requests(args: argparse.Namespace, vocab: int, seed: int) -> list[GenerationRequest]:
    """The same prompts for ours and the loop; the bench client draws its own of the same kind."""
    draw = random.Random(seed)
    sampling = SamplingParams(max_new_tokens=args.new_tokens, temperature=1.0)
    offsets = [draw.randrange(vocab) for _ in range(args.requests)]
    return [
        GenerationRequest(tuple((offset + k) % vocab for k in range(args.prompt_tokens)), sampling)
        for offset in offsets
    ]


async def run_ours(args: argparse.Namespace, url: str, vocab: int, seed: int) -> Run:
    """Our client behind ``generate_all``."""
    requests = build_requests(args, vocab, seed)
    engine = SglangServer(
        url,
        api_key=None,
        vocab_size=vocab,
        max_context=args.prompt_tokens + args.new_tokens,
        max_in_flight=args.in_flight,
        request_timeout_s=None,
        control_timeout_s=60,
    )
    try:
        started, cpu = time.perf_counter(), time.process_time()
        results = await generate_all(engine, requests)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    finally:
        await engine.close()
    return Run(seconds, cpu, len(results), sum(len(result.token_ids) for result in results))


async def run_plain(args: argparse.Namespace, url: str, vocab: int, seed: int) -> Run:
    """Ten plain lines: a pool of connections, workers, JSON, no checks."""
    requests = iter(build_requests(args, vocab, seed))
    tokens = []

    async def work(session: aiohttp.ClientSession) -> None:
        for request in requests:
            body = {
                "input_ids": list(request.prompt_ids),
                "return_logprob": True,
                "sampling_params": {
                    "temperature": 1.0,
                    "max_new_tokens": args.new_tokens,
                    "ignore_eos": True,
                },
            }
            async with session.post(f"{url}/generate", json=body) as response:
                reply = await response.json()
                tokens.append(len(reply["output_ids"]))

    connector = aiohttp.TCPConnector(limit=args.in_flight)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    ) as session:
        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work(session) for _ in range(args.in_flight)))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Run(seconds, cpu, len(tokens), sum(tokens))


def run_bench(args: argparse.Namespace, url: str, seed: int) -> Run:
    """``sglang.benchmark.serving`` (``sglang.bench_serving`` before) in its own process, by its own
    clock.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.jsonl"
        line = [
            args.sglang_python,
            "-m",
            "sglang.benchmark.serving",
            "--backend",
            "sglang",
            "--base-url",
            url,
            "--model",
            str(args.model),
            "--dataset-name",
            "random-ids",
            "--tokenize-prompt",
            "--random-input-len",
            str(args.prompt_tokens),
            "--random-output-len",
            str(args.new_tokens),
            "--random-range-ratio",
            "1.0",
            "--num-prompts",
            str(args.requests),
            "--request-rate",
            "inf",
            "--max-concurrency",
            str(args.in_flight),
            "--disable-stream",
            "--return-logprob",
            "--temperature",
            "1.0",
            "--seed",
            str(seed),
            "--flush-cache",
            "--disable-tqdm",
            "--output-file",
            str(out),
        ]
        done = subprocess.run(
            line, env=child_environment(), capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode or not out.exists():
            sys.exit(f"sglang's bench client failed: {(done.stdout + done.stderr)[-2000:]}")
        row = json.loads(out.read_text().splitlines()[-1])
    return Run(row["duration"], None, row["completed"], row["total_output_tokens"])


def child_environment() -> dict[str, str]:
    """One thread, no network, and none of this process's import path."""
    changes = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | changes


async def serve_fake(port: int) -> None:
    """SGLang's ``/generate`` with made-up tokens, and the calls the bench client makes before it
    starts.
    """

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        count = body["sampling_params"]["max_new_tokens"]
        return web.json_response(
            {
                "text": "x" * count,
                "output_ids": [5] * count,
                "meta_info": {
                    "id": body.get("rid"),
                    "finish_reason": {"type": "length", "length": count},
                    "prompt_tokens": len(body["input_ids"]),
                    "completion_tokens": count,
                    "cached_tokens": 0,
                    "weight_version": "0",
                    "weight_versions": [{"version": "0", "start": 0, "end": count}],
                    "output_token_logprobs": [[-1.2345678901, 5, None]] * count,
                    "e2e_latency": 0.0,
                },
            }
        )

    async def fine(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "root": "fake"}], "internal_states": []})

    app = web.Application()
    app.add_routes(
        [
            web.post("/generate", generate),
            *(
                web.get(path, fine)
                for path in (
                    "/health",
                    "/v1/models",
                    "/server_info",
                    "/model_info",
                    "/get_model_info",
                )
            ),
            web.post("/flush_cache", fine),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of the given, the fake or a real server of our own; ours ends with the block."""
    if args.url:
        yield args.url.rstrip("/")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fake = [sys.executable, __file__, "--serve-fake", str(port)]
    real = [
        args.sglang_python,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(args.model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--attention-backend",
        "torch_native",
        "--sampling-backend",
        "pytorch",
        "--max-total-tokens",
        "65536",
        "--sleep-on-idle",
        "--weight-version",
        "0",
    ]
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            fake if args.fake else real,
            env=os.environ if args.fake else child_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_healthy(url, process, Path(log.name))
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    """Return when ``/health`` answers; end the program with the server's last words when it does
    not.
    """
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return
        time.sleep(0.5)
    sys.exit(f"the server did not come up: {log.read_text()[-2000:]}")


def flush(url: str) -> None:
    """Empty the prefix cache; the server rejects this while it is busy."""
    for _ in range(50):
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(
                urllib.request.Request(f"{url}/flush_cache", method="POST"), timeout=30
            )
            return
        time.sleep(0.1)
    sys.exit(f"{url}/flush_cache: the server does not become idle")


def measure(args: argparse.Namespace, url: str) -> dict[str, list[Run]]:
    """Alternating repeats after one short warm-up."""
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    clients = {
        OURS: lambda seed: asyncio.run(run_ours(args, url, vocab, seed)),
        PLAIN: lambda seed: asyncio.run(run_plain(args, url, vocab, seed)),
    }
    if args.sglang_python:
        clients[BENCH] = lambda seed: run_bench(args, url, seed)
    warm = argparse.Namespace(**{**vars(args), "requests": min(64, args.requests)})
    for run in (run_ours, run_plain):
        asyncio.run(run(warm, url, vocab, 10_000))
    freeze_heap()
    runs: dict[str, list[Run]] = {name: [] for name in clients}
    for repeat in range(args.repeats):
        # Another order every time: the first client finds the machine as the last one left it.
        names = list(clients)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            flush(url)
            runs[name].append(run := clients[name](repeat))
            print(f"  {name:13s} {run.requests / run.seconds:8.1f} requests/s", flush=True)
            if run.requests != args.requests or run.tokens != args.requests * args.new_tokens:
                sys.exit(
                    f"{name}: {run.requests} requests and {run.tokens} tokens: not the requested work"
                )
    return runs


def main() -> None:
    """Print medians and ratios."""
    args = options()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("terminated")
    )  # so that the server ends with this process
    if args.serve_fake:
        asyncio.run(serve_fake(args.serve_fake))
        return
    if not (args.sglang_python or args.fake or args.url):
        sys.exit("give --sglang-python (to start a server), --url or --fake")
    with server(args) as url:
        kind = "given" if args.url else "fake" if args.fake else "real"
        print(
            f"{kind} server, {args.requests} requests of {args.prompt_tokens} + "
            f"{args.new_tokens} tokens, "
            f"{args.in_flight} in flight, {args.repeats} repeats"
        )
        runs = measure(args, url)
    rates = {
        name: statistics.median(run.requests / run.seconds for run in those)
        for name, those in runs.items()
    }
    for name, those in runs.items():
        cpu = [run.cpu_seconds / run.requests * 1e3 for run in those if run.cpu_seconds is not None]
        spent = f", {statistics.median(cpu):.2f} CPU ms per request" if cpu else ""
        print(
            f"{name:13s} {rates[name]:8.1f} requests/s "
            f"{rates[name] * args.new_tokens:9.0f} tokens/s{spent}"
        )
    best = max((name for name in rates if name != OURS), key=rates.__getitem__)
    for name in rates:
        if name != OURS:
            print(f"ours / {name}: {rates[OURS] / rates[name]:.3f}")
    print(f"ratio to the better ({best}): {rates[OURS] / rates[best]:.3f} (target 0.95)")


if __name__ == "__main__":
    main()
