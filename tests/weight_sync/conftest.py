"""A small model and its trainer."""

import json

import pytest
import torch

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.megatron.worker import MegatronWorker

CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
"""A vocabulary of 37 is padded on both sides."""


@pytest.fixture(scope="module")
def worker():
    torch.set_num_threads(1)
    layout = MegatronConfig(dtype="float32", distributed_optimizer=False)
    return MegatronWorker.from_config(
        json.loads(json.dumps(CONFIG)), layout, 0, OptimizerConfig(lr=0.1)
    )


@pytest.fixture
def perturbed(worker):
    """The trainer with weights that no test before had."""
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return worker
