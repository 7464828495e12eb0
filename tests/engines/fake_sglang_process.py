"""The fake SGLang server in a process of its own, so that a test can kill it or stop it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

from fake_sglang import FakeSglang


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def fake_process(port: int, *flags: str, api_key: str | None = None) -> Iterator[subprocess.Popen]:
    """A fake server in a process of its own, ready when this yields; killed at the end. The key
    goes by environment.
    """
    environment = {**os.environ, **({"FAKE_SGLANG_KEY": api_key} if api_key else {})}
    process = subprocess.Popen(
        [sys.executable, __file__, "--port", str(port), *flags], env=environment
    )
    try:
        for _ in range(200):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1),
            ):
                break
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


async def _serve(arguments: argparse.Namespace) -> None:
    fake = FakeSglang(
        vocab_size=arguments.vocab_size,
        context=arguments.context,
        version=arguments.weight_version,
        api_key=os.environ.get("FAKE_SGLANG_KEY"),
        on_death=lambda: os._exit(1),
    )
    fake.faults.token_s = arguments.token_s
    await fake.start(arguments.port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--weight-version", default="0")
    parser.add_argument("--token-s", type=float, default=0.0)
    asyncio.run(_serve(parser.parse_args()))
