"""SGLang's own module on every tensor-parallel rank, without the other ranks: ``module_ranks.py
TP,TP... FOLDER...``.

Runs in SGLang's environment and prints one JSON object: for each number of ranks, folder and rank,
every parameter's shape and checksum after SGLang's own loader has read the folder. Loading needs no
communication, so the process group is torch's fake one.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sglang.srt.distributed.device_communicators.shm_broadcast import MessageQueue
from sglang.srt.distributed.parallel_state import (
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.managers.mm_utils import tensor_hash
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_context, get_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig


def become_rank(tp, rank):
    """Be rank ``rank`` of ``tp``, as a server of that many GPUs has it."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp)
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, *_, **__: new_group(
        ranks, backend="fake"
    )  # also those that SGLang wants gloo
    MessageQueue.create_from_process_group = staticmethod(lambda *_, **__: None)
    arguments = (
        get_context().override_server_args(tp_size=tp, device="cpu", dtype="float32").install()
    )
    init_distributed_environment(world_size=tp, rank=rank, local_rank=0, backend="fake")
    initialize_model_parallel(backend="fake")
    get_parallel().override_permanently(
        tp_rank=rank,
        pp_rank=0,
        attn_tp_rank=rank,
        attn_dp_rank=0,
        attn_cp_rank=0,
        moe_tp_rank=rank,
        moe_ep_rank=0,
        moe_dp_rank=0,
    )
    initialize_dp_attention(arguments)


def loaded(folder):
    """Shape and checksum of every parameter of SGLang's model for ``folder``, by SGLang's name."""
    config = AutoConfig.from_pretrained(folder)
    model = ModelRegistry.resolve_model_cls(config.architectures)[0](config)
    model.load_weights(load_file(Path(folder) / "model.safetensors").items())
    return {
        name: [list(parameter.shape), f"{tensor_hash(parameter.detach()):016x}"]
        for name, parameter in model.named_parameters()
    }


def on_every_rank(tp, folders):
    found = {folder: [] for folder in folders}
    for rank in range(tp):
        reading, writing = os.pipe()
        if os.fork() == 0:  # a process has one rank for good; its imports it has from here
            with contextlib.redirect_stdout(sys.stderr), os.fdopen(writing, "w") as pipe:
                torch.set_num_threads(1)
                become_rank(tp, rank)
                json.dump([loaded(folder) for folder in folders], pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            for folder, parameters in zip(folders, json.load(pipe), strict=True):
                found[folder].append(parameters)
        os.wait()
    return found


if __name__ == "__main__":
    print(json.dumps({tp: on_every_rank(int(tp), sys.argv[2:]) for tp in sys.argv[1].split(",")}))
