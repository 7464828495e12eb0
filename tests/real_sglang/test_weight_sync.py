"""New weights into a real SGLang server by every transport, and what happens when they arrive wrong
or not at all.

The trainer is a one-rank Megatron worker with perturbed copies of the toy task's generator. Gloo
and shared memory stand for NCCL and CUDA IPC, which are proven by nothing here.
"""

import asyncio
import contextlib
import os
import resource
import subprocess

import pytest
import torch
from engine_cases import generate_all
from real_server import real_server

from spark_nemo.config import MegatronConfig, WeightSyncConfig
from spark_nemo.engines import (
    EngineFailure,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Tokenizer,
)
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.local import LocalEngine
from spark_nemo.engines.sglang import SglangServer
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.toy.problem_files import split_problems
from spark_nemo.training.packing import TrainSequence, pack
from spark_nemo.weight_sync.logprob_gate import FirstStepGate, WeightMismatch
from spark_nemo.weight_sync.synchronizer import WeightSync
from spark_nemo.weight_sync.weight_stream import Export

pytestmark = pytest.mark.timeout(400)
TRANSPORTS = ("disk", "distributed", "tensor")


@pytest.fixture(scope="module")
def trainer(model_folder):
    torch.set_num_threads(1)
    return MegatronWorker.from_hf(
        model_folder, MegatronConfig(dtype="float32", distributed_optimizer=False), 0
    )


@pytest.fixture
def perturbed(trainer):
    """The trainer with weights that no server has yet."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    return trainer


@pytest.fixture(scope="module")
def server(real, model_folder):
    """A client of the session's server; afterwards it has its own weights again."""
    client = client_of(real)
    yield client
    run_async(client.update_weights_from_disk(model_folder, 0))
    run_async(client.close())


def client_of(real):
    return SglangServer(
        real.url,
        api_key=None,
        vocab_size=691,
        max_context=506,
        max_in_flight=32,
        request_timeout_s=120,
        control_timeout_s=60,
    )


@pytest.fixture(scope="module")
def prompts(model_folder):
    tokenizer = Tokenizer.load(model_folder)
    return [
        tokenizer.encode_chat([{"role": "user", "content": problem.question}])
        for problem in split_problems("eval", 24, 0)
    ]


def sync_for(trainer, run_folder, transport, model_folder, **settings):
    settings = {"checksums": "require", "timeout_s": 60, "bucket_mb": 1, **settings}
    return WeightSync.build(
        WeightSyncConfig(transport=transport, **settings),
        trainer,
        engine_kind="sglang",
        folder=run_folder,
        source_dir=model_folder,
    )


def push(sync, trainer, server, version):
    try:
        run_async(sync.push(trainer, server, version))
    finally:
        run_async(sync.close())


def greedy(engine, prompts):
    params = SamplingParams(max_new_tokens=40, temperature=0.0)
    return run_async(generate_all(engine, [GenerationRequest(ids, params) for ids in prompts]))


def same(found, wanted, tolerance):
    """Equal tokens, and log-probabilities within ``tolerance`` nats; the largest difference."""
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    largest = max(
        abs(a - b)
        for one, other in zip(found, wanted)
        for a, b in zip(one.logprobs, other.logprobs)
    )
    assert largest <= tolerance
    return largest


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_server_serves_what_the_trainer_has(
    perturbed, server, prompts, tmp_path, model_folder, transport
):
    """Each transport, checksums required: every tensor of the server hashes to the trainer's,
    greedy completions equal those of the embedded engine on the exported checkpoint token for
    token, log-probabilities within 1e-4, and tokens carry the version. The same prompts were served
    under the old weights: no cached prefix survives.
    """
    before = greedy(server, prompts)
    version = max(before[0].weight_versions) + 1
    sync = sync_for(perturbed, tmp_path, transport, model_folder)
    assert len(sync.plan.buckets) > 2
    push(sync, perturbed, server, version)
    perturbed.save_hf(tmp_path / "exported", source_dir=model_folder)
    local = LocalEngine.from_folder(tmp_path / "exported", max_batch_size=32, max_context=506)
    found = greedy(server, prompts)
    same(found, greedy(local, prompts), 1e-4)
    assert {v for one in found for v in one.weight_versions} == {version}
    assert [one.logprobs for one in found] != [one.logprobs for one in before]
    assert (
        sync.memory_peak <= sync.plan.buffer_bytes + sync.plan.largest_bytes < sync.plan.total_bytes
    )


def test_as_a_server_started_from_the_checkpoint(
    perturbed, server, prompts, tmp_path, model_folder
):
    """After a push, the server gives what a second real server gives that was started from the
    exported checkpoint.
    """
    push(sync_for(perturbed, tmp_path, "tensor", model_folder), perturbed, server, 50)
    perturbed.save_hf(tmp_path / "exported", source_dir=model_folder)
    with real_server(tmp_path / "exported", tmp_path / "second.log") as second:
        fresh = client_of(second)
        wanted, sums = greedy(fresh, prompts), run_async(fresh.weights_checksum())
        run_async(fresh.close())
    same(greedy(server, prompts), wanted, 1e-5)
    assert run_async(server.weights_checksum()) == sums


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_generation_is_paused_not_lost(
    perturbed, server, prompts, tmp_path, model_folder, transport
):
    """Requests in the middle of their response when a push comes are finished after it, whole, by
    the new weights from there on: each token says which. How long a response takes is the machine's
    affair, so several moments are tried.
    """
    sync = sync_for(perturbed, tmp_path, transport, model_folder)
    old, met = run_async(server.weight_version()), set()

    async def scenario(delay_s, version):
        params = SamplingParams(max_new_tokens=420, temperature=1.0)
        running = [
            asyncio.create_task(server.generate(GenerationRequest(ids, params)))
            for ids in prompts[:8]
        ]
        await asyncio.sleep(delay_s)
        await sync.push(perturbed, server, version)
        return await asyncio.gather(*running)

    for number, delay_s in enumerate((0.5, 1.0, 0.25, 2.0, 4.0), start=1):
        done = run_async(scenario(delay_s, old + number))
        assert all(
            len(one.token_ids) == 420 and one.finish_reason is FinishReason.LENGTH for one in done
        )
        assert all(list(one.weight_versions) == sorted(one.weight_versions) for one in done)
        met = {frozenset(one.weight_versions) for one in done}
        assert all(versions <= {old + number - 1, old + number} for versions in met)
        if any(len(versions) == 2 for versions in met):
            break
    run_async(sync.close())
    assert any(len(versions) == 2 for versions in met)


@pytest.fixture
def corrupting(monkeypatch):
    """A wire that changes one element of one tensor after the trainer has hashed it."""
    whole = Export.__iter__

    def corrupted(self):
        for name, tensor in whole(self):
            if name == "model.layers.2.mlp.down_proj.weight":
                tensor = tensor.clone()
                tensor[3] += 0.4
            yield name, tensor

    monkeypatch.setattr(Export, "__iter__", corrupted)
    return monkeypatch


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_corrupted_tensor_is_caught_by_the_checksum(
    perturbed, server, tmp_path, model_folder, corrupting, transport
):
    """The push fails with the name of the one parameter that is not what was sent."""
    with pytest.raises(
        EngineFailure, match=r"1 of 30 tensors .*: model\.layers\.2\.mlp\.down_proj\.weight$"
    ):
        push(sync_for(perturbed, tmp_path, transport, model_folder), perturbed, server, 60)


def test_without_checksums_the_gate_catches_it(
    perturbed, server, prompts, tmp_path, model_folder, corrupting
):
    """Tokens sampled under a corrupted tensor shut the first-step gate, which names the tensor;
    after a clean push it opens.
    """
    sync = sync_for(perturbed, tmp_path, "tensor", model_folder, checksums="off")
    push(sync, perturbed, server, 61)
    corrupting.undo()
    with pytest.raises(
        WeightMismatch, match=r"tensors that differ: model\.layers\.2\.mlp\.down_proj\.weight;"
    ):
        gate_on_samples(sync, perturbed, server, prompts).decide()
    push(sync, perturbed, server, 62)
    assert gate_on_samples(sync, perturbed, server, prompts).decide().largest < 1e-3


def gate_on_samples(sync, trainer, server, prompts):
    """A gate that has seen sampled tokens with both sides' log-probabilities at temperature 0.8."""
    params = SamplingParams(max_new_tokens=40, temperature=0.8)
    done = run_async(generate_all(server, [GenerationRequest(ids, params) for ids in prompts]))
    sequences = [
        TrainSequence(ids, one.token_ids, {"engine": torch.tensor(one.logprobs)})
        for ids, one in zip(prompts, done)
    ]
    packed = pack(sequences, 4096)
    settings = WeightSyncConfig(max_mean_mismatch=1e-4, max_token_mismatch=1e-3)
    gate = FirstStepGate(settings, lambda: run_async(sync.differing_tensors(trainer, server)))
    for batch, logprobs_T in zip(packed.micro_batches, trainer.logprobs(packed.micro_batches, 0.8)):
        gate.observe(logprobs_T, batch.extras["engine"], batch.labels_T, batch.loss_mask_T > 0)
    return gate


@contextlib.contextmanager
def full_disk(folder):
    """A folder with 1 MiB of space if mounting is permitted, else a limit of file sizes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if (
        os.geteuid() == 0
        and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    ):
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_weights_served(
    perturbed, server, prompts, tmp_path, model_folder
):
    """No space for the new version: one error that names the folder, the server answers as before,
    version and all, and the next push with space goes through.
    """
    push(sync_for(perturbed, tmp_path, "disk", model_folder), perturbed, server, 70)
    before = greedy(server, prompts)
    with torch.no_grad():
        next(perturbed.model.parameters()).add_(0.01)
    with full_disk(tmp_path / "small"):
        sync = sync_for(perturbed, tmp_path, "disk", model_folder, folder=str(tmp_path / "small"))
        with pytest.raises(
            EngineFailure, match=r"weights version 71: cannot write .*/small/version-71: "
        ):
            push(sync, perturbed, server, 71)
    after = greedy(server, prompts)
    same(after, before, 1e-5)
    assert {v for one in after for v in one.weight_versions} == {70}
    push(sync_for(perturbed, tmp_path, "disk", model_folder), perturbed, server, 72)
    assert run_async(server.weight_version()) == 72
