"""Real SGLang servers for tests: started on loopback from the environment of ``make test-sglang``,
always killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SWITCH = "SPARK_TEST_SGLANG"
"""``make test-sglang`` sets it; a plain ``make test`` starts no server."""
READY_WITHIN_S = 240.0
"""It took 30 to 141 s, nearly all of it imports."""
FLAGS = (
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
)


@dataclass(frozen=True, slots=True)
class RealServer:
    """A server that answers at ``url``; ``log`` holds what it printed."""

    url: str
    process: subprocess.Popen
    log: Path


def sglang_python() -> Path:
    """The interpreter that has SGLang: ``SPARK_SGLANG_PYTHON``, or that of ``.venv-sglang`` in the
    checkout.
    """
    checkout = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("SPARK_SGLANG_PYTHON", checkout / ".venv-sglang" / "bin" / "python"))


def why_not() -> str | None:
    """Why real servers cannot be started now; None when they can."""
    if os.environ.get(SWITCH) != "1":
        return "starts real SGLang servers: run make test-sglang"
    if not sglang_python().exists():
        return f"{sglang_python()} does not exist: run tests/sglang_env/build.sh"
    return None


@contextlib.contextmanager
def real_server(model: Path, log: Path, flags: Sequence[str] = ()) -> Iterator[RealServer]:
    """Serve ``model`` until the block ends, then kill the whole process tree.

    Raises ``RuntimeError`` with the end of the log when the server does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(sglang_python()),
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *FLAGS,
        *flags,
    ]
    environment = {
        **os.environ,
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)  # ours would shadow the server's packages
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        server = RealServer(f"http://127.0.0.1:{port}", process, log)
        _wait_until_it_generates(server)
        yield server
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the process, its descendants and its group, and wait for them."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def _wait_until_it_generates(server: RealServer) -> None:
    """``/health`` is 503 until the warm-up generation is through."""
    end = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < end and server.process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(server.url + "/health", timeout=30),
        ):
            return
        time.sleep(0.5)
    what = (
        "ended" if server.process.poll() is not None else f"is not ready after {READY_WITHIN_S:g} s"
    )
    raise RuntimeError(
        f"the SGLang server {what}; its log ends:\n{server.log.read_text(errors='replace')[-3000:]}"
    )
