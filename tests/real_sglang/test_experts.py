"""A mixture of experts: SGLang's own module for several tensor-parallel ranks, and weights pushed
into a real server.

The model is Qwen3's with 8 experts, random, 64 wide: on a CPU SGLang pads experts to multiples of
32, and a padded one has another checksum. It computes them there by its plain torch code; the
Triton kernels of a GPU, and engines' expert parallelism, are not proven.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from real_server import real_server, sglang_python
from safetensors.torch import load_file
from test_weight_sync import client_of, gate_on_samples, greedy, push

from spark_nemo.config import MegatronConfig, OptimizerConfig, WeightSyncConfig
from spark_nemo.engines import Tokenizer
from spark_nemo.engines.async_utils import run_async
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.param_mapping import hf_tensor_shapes
from spark_nemo.models.spec import ModelSpec
from spark_nemo.toy.problem_files import split_problems
from spark_nemo.training.packing import TrainSequence, pack
from spark_nemo.weight_sync.checksum import ExpectedChecksums, differing
from spark_nemo.weight_sync.sync_plan import plan_sync
from spark_nemo.weight_sync.synchronizer import WeightSync

pytestmark = pytest.mark.timeout(400)
RANKS = (1, 2, 4)
SIZES = {
    "vocab_size": 691,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Qwen2": {"tie_word_embeddings": True, "use_sliding_window": False},
    "Llama": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": False, "head_dim": 16},
    "Qwen3Moe": {
        "tie_word_embeddings": False,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


def make_hf(family, folder, tokenizer_from):
    """A float32 model with random norms and router, with the toy task's tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("mlp.gate.weight"):
                parameter.normal_()
    model.save_pretrained(folder)
    for path in Path(tokenizer_from).glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model_folder):
    store = tmp_path_factory.mktemp("families")
    return {family: make_hf(family, store / family, model_folder) for family in FAMILIES}


@pytest.fixture(scope="module")
def served(folders):
    """The tensors of SGLang's modules: by number of tensor-parallel ranks, folder and rank."""
    command = [
        str(sglang_python()),
        str(Path(__file__).parent / "module_ranks.py"),
        ",".join(map(str, RANKS)),
    ]
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, *map(str, folders.values())],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tp", RANKS)
def test_sglangs_own_module_has_what_the_plan_says(folders, served, tp):
    """For 1, 2 and 4 tensor-parallel ranks (of 2 key-value heads) SGLang's module, filled by
    SGLang's loader, has on every rank the names and shapes of the plan's view and, in every
    parameter, the bytes that the plan takes from the checkpoint: by checksum, for the dense
    families and for experts.
    """
    for family, folder in folders.items():
        spec = ModelSpec.from_hf(read_hf_config(folder))
        plan = plan_sync(
            spec,
            "float32",
            tensor_parallel=1,
            engine_tensor_parallel=tp,
            bucket_bytes=1 << 20,
        )
        expected, tensors = (
            ExpectedChecksums(plan.engine_ranks, torch.float32),
            load_file(folder / "model.safetensors"),
        )
        for name in hf_tensor_shapes(spec):
            expected.add(name, tensors[name])
        ranks = served[str(tp)][str(folder)]
        assert [{name: tuple(shape) for name, (shape, _) in rank.items()} for rank in ranks] == [
            {tensor.name: tensor.shape for tensor in rank} for rank in plan.engine_ranks
        ], family
        assert (
            differing(
                expected.result(),
                [{name: sha for name, (_, sha) in rank.items()} for rank in ranks],
            )
            == []
        )


@pytest.fixture(scope="module")
def prompts(model_folder):
    tokenizer = Tokenizer.load(model_folder)
    return [
        tokenizer.encode_chat([{"role": "user", "content": problem.question}])
        for problem in split_problems("eval", 12, 0)
    ]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def server(request, folders, tmp_path_factory):
    """A server of one and of two tensor-parallel ranks, with its client. SGLang on a CPU wants a
    core for each.
    """
    cores, tp = sorted(os.sched_getaffinity(0)), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "SGLANG_CPU_OMP_THREADS_BIND",
            "|".join(str(cores[rank % len(cores)]) for rank in range(tp)),
        )
        with real_server(
            folders["Qwen3Moe"],
            tmp_path_factory.mktemp("experts") / "server.log",
            ["--tp-size", str(tp)],
        ) as real:
            client = client_of(real)
            yield client, tp
            run_async(client.close())


@pytest.fixture(scope="module")
def trainer(folders):
    torch.set_num_threads(1)
    return MegatronWorker.from_hf(
        folders["Qwen3Moe"],
        MegatronConfig(dtype="float32", distributed_optimizer=False),
        0,
        OptimizerConfig(lr=1e-2),
    )


def train(trainer, prompts):
    """One optimizer step on the prompts themselves."""
    packed = pack([TrainSequence(ids[:4], ids[4:], {}) for ids in prompts], 4096)

    def loss_fn(logprobs_T, entropy_T, batch):
        return -(logprobs_T * batch.loss_mask_T).sum(), {"tokens": batch.loss_mask_T.sum()}

    return trainer.train_step(packed.micro_batches, loss_fn)


@pytest.mark.parametrize("transport", ["disk", "distributed", "tensor"])
def test_trained_experts_are_served(trainer, server, prompts, folders, tmp_path, transport):
    """One step trained, then pushed, checksums required: every parameter of every rank hashes to
    the trainer's, greedy tokens are those of transformers on the exported checkpoint with
    log-probabilities within 1e-4, and the first-step gate opens at 1e-4 nats on average and 1e-3 at
    most. The old weights would not have passed.
    """
    from transformers import AutoModelForCausalLM

    server, tp = server
    version = run_async(server.weight_version()) + 1
    train(trainer, prompts)
    sync = WeightSync.build(
        WeightSyncConfig(transport=transport, checksums="require", timeout_s=60, bucket_mb=1),
        trainer,
        engine_kind="sglang",
        folder=tmp_path,
        source_dir=folders["Qwen3Moe"],
        engine_tensor_parallel=tp,
    )
    assert len(run_async(sync.differing_tensors(trainer, server))) > 15 * tp
    push(sync, trainer, server, version)
    trainer.save_hf(tmp_path / "exported", source_dir=folders["Qwen3Moe"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    for ids, found in zip(prompts, greedy(server, prompts), strict=True):
        assert set(found.weight_versions) == {version}
        with torch.no_grad():
            logprobs_TV = (
                model(torch.tensor([[*ids, *found.token_ids]]))
                .logits[0, len(ids) - 1 : -1]
                .log_softmax(-1)
            )
        assert logprobs_TV.argmax(-1).tolist() == list(found.token_ids)
        own_T = logprobs_TV.gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
        assert float((own_T - torch.tensor(found.logprobs)).abs().max()) < 1e-4
    assert gate_on_samples(sync, trainer, server, prompts).decide().largest < 1e-3
    run_async(sync.close())
