"""Start ``receiver.py`` processes and talk to them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.sglang.server import SglangServer


class ReceiverProcess:
    """A running ``receiver.py`` and a client of it."""

    def __init__(self, port):
        self.command = [
            sys.executable,
            str(Path(__file__).parent / "receiver.py"),
            "--port",
            str(port),
        ]
        self.start()
        self.url = f"http://127.0.0.1:{port}"
        self.engine = SglangServer(
            self.url,
            api_key=None,
            vocab_size=37,
            max_context=64,
            max_in_flight=4,
            request_timeout_s=10,
            control_timeout_s=10,
        )

    def start(self):
        """Start a process; after its death, another one at the same address."""
        self.process = subprocess.Popen(
            self.command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )

    def tricks(self, **tricks):
        body = json.dumps(tricks).encode()
        request = urllib.request.Request(
            f"{self.url}/_faults", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=5).close()

    def until_ready(self):
        """Wait for it to import torch and listen, which takes some seconds."""
        for _ in range(600):
            assert self.process.poll() is None
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/ready", timeout=1),
            ):
                break
            time.sleep(0.1)


@contextlib.contextmanager
def start_receivers(count):
    """Start ``count`` servers at once; they need some seconds, mostly to import torch."""
    running = []
    try:
        for _ in range(count):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            running.append(ReceiverProcess(port))
        for one in running:
            one.until_ready()
        yield running
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
            run_async(one.engine.close())
