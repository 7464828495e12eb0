"""Starting a real vLLM server for a test, and ending it for certain."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.engines.vllm import VllmServer, server_command, server_environment

PYTHON = os.environ.get("SPARK_VLLM_PYTHON")
VOCAB, CONTEXT, NAME = 691, 512, "verifier"
START_TIMEOUT_S = 280


@dataclass(frozen=True)
class RealServer:
    """A server that is up."""

    url: str
    key: str

    def engine(self, **settings) -> VllmServer:
        return VllmServer(
            self.url,
            **{
                "api_key": self.key,
                "served_name": NAME,
                "vocab_size": VOCAB,
                "max_context": CONTEXT,
                "max_in_flight": 64,
                "request_timeout_s": 120.0,
                "control_timeout_s": 20.0,
                **settings,
            },
        )

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def real_server(model: Path, log: Path, *changes: str) -> Iterator[RealServer]:
    """Start on a free port, wait until healthy, and end the whole process group afterwards.
    ``changes`` are appended to the command line, where the last of equal flags counts.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = secrets.token_hex(16)
    line = server_command(
        PYTHON,
        model,
        port=port,
        served_name=NAME,
        max_context=CONTEXT,
        max_batch_size=64,
        dtype="float32",
        extra=("--enforce-eager", *changes),
    )
    environment = server_environment(
        {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
        key,
    )
    environment.pop("PYTHONPATH", None)
    with log.open("w") as file:
        process = subprocess.Popen(
            line, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield RealServer(f"http://127.0.0.1:{port}", key)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if urllib.request.urlopen(url, timeout=2).status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM did not come up: {log.read_text()[-2000:]}")
