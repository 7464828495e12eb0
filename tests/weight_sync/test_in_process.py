"""Push weights from a trainer into an engine of the same process, here a recording one."""

import json
from pathlib import Path

import pytest
import torch

from spark_nemo.config import MegatronConfig, OptimizerConfig, WeightSyncConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.base import Engine, EngineFailure
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.weight_sync.synchronizer import WeightSync

CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "tie_word_embeddings": True,
}


class RecordingEngine(Engine):
    """Records the tensors; fails after ``fail_after`` of them."""

    def __init__(self, fail_after=None):
        self.tensors = {}
        self.version = 0
        self.fail_after = fail_after

    async def update_weights(self, tensors, version):
        for count, (name, tensor) in enumerate(tensors):
            if count == self.fail_after:
                raise EngineFailure(f"unknown tensor {name}")
            self.tensors[name] = tensor
        self.version = version

    async def generate(self, request): ...
    async def pause(self): ...
    async def resume(self): ...
    async def health(self): ...
    async def close(self): ...


@pytest.fixture(scope="module")
def worker():
    torch.set_num_threads(1)
    layout = MegatronConfig(dtype="float32", distributed_optimizer=False)
    return MegatronWorker.from_config(
        json.loads(json.dumps(CONFIG)), layout, 0, OptimizerConfig(lr=0.1)
    )


def push(worker, engine, version):
    sync = WeightSync.build(WeightSyncConfig(), worker, engine_kind="local", folder=Path("unused"))
    run_async(sync.push(worker, engine, version))


def train(worker):
    row = torch.arange(5)
    batch = PackedBatch(row, row + 1, row, torch.tensor([0, 5]).int(), torch.ones(5))
    worker.train_step([batch], lambda logprobs, entropy, batch: (-logprobs.sum(), {}))


def test_the_engine_receives_every_tensor(worker):
    """The engine holds every exported tensor under its version, and keeps it when training goes on."""
    engine = RecordingEngine()
    push(worker, engine, version=3)
    exported = {name: tensor.clone() for name, tensor in worker.export_hf()}
    train(worker)
    assert engine.version == 3 and engine.tensors.keys() == exported.keys()
    assert all(torch.equal(engine.tensors[name], exported[name]) for name in exported)
    assert any(not torch.equal(tensor, exported[name]) for name, tensor in worker.export_hf())


def test_a_failed_update_reaches_the_caller(worker):
    """An engine that fails half-way leaves no unfinished export behind: the next push works."""
    with pytest.raises(EngineFailure, match="weights version 4: unknown tensor"):
        push(worker, RecordingEngine(fail_after=5), version=4)
    engine = RecordingEngine()
    push(worker, engine, version=5)
    assert engine.version == 5
