"""A small model, its trainer, and servers that really receive weights."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.engines.client import run_async
from spark_nemo.engines.sglang.server import SglangServer
from spark_nemo.megatron.worker import MegatronWorker

CONFIG = {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 37, "tie_word_embeddings": True,
          "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 128, "initializer_range": 0.2}
"""37: the vocabulary is padded on both sides."""


@pytest.fixture(scope="module")
def worker():
    torch.set_num_threads(1)
    layout = MegatronConfig(dtype="float32", distributed_optimizer=False)
    return MegatronWorker.from_config(json.loads(json.dumps(CONFIG)), layout, 0, OptimizerConfig(lr=0.1))


@pytest.fixture
def perturbed(worker):
    """The trainer with new weights, other than in every test before."""
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return worker


class ReceiverProcess:
    """A running ``receiver.py`` and a client of it."""

    def __init__(self, process, port):
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.engine = SglangServer(self.url, api_key=None, vocab_size=37, max_context=64, max_in_flight=4,
                                   request_timeout_s=10, control_timeout_s=10)

    def tricks(self, **tricks):
        body = json.dumps(tricks).encode()
        request = urllib.request.Request(f"{self.url}/_faults", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=5).close()


@contextlib.contextmanager
def start_receivers(count):
    """``count`` servers at once; they need some seconds, mostly to import torch."""
    script, running = Path(__file__).parent / "receiver.py", []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        for _ in range(count):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            process = subprocess.Popen([sys.executable, str(script), "--port", str(port)], env=environment)
            running.append(ReceiverProcess(process, port))
        for one in running:
            for _ in range(600):
                assert one.process.poll() is None
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{one.url}/ready", timeout=1):
                    break
                time.sleep(0.1)
        yield running
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
            run_async(one.engine.close())
