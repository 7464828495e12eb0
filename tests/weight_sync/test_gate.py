"""A corrupted tensor in the engine is found by checksum, or else by the first-step gate.

The embedded engine samples; the small trainer makes the step.
"""

import dataclasses

import pytest
import torch
from engine_cases import generate_all

from spark_nemo.config import RLConfig, SamplingConfig, WeightSyncConfig
from spark_nemo.config.rl import ClippedLoss, LossConfig
from spark_nemo.engines.async_utils import run_async
from spark_nemo.engines.base import EngineFailure, GenerationRequest, SamplingParams
from spark_nemo.engines.local import LocalEngine
from spark_nemo.records import Problem, Rollout
from spark_nemo.training.grpo import train_on_rollouts
from spark_nemo.weight_sync.logprob_gate import FirstStepGate, WeightMismatch
from spark_nemo.weight_sync.synchronizer import WeightSync

TEMPERATURE = 0.7
FLOAT32 = WeightSyncConfig(max_mean_mismatch=1e-4, max_token_mismatch=1e-3)


@pytest.fixture
def engine(worker, tmp_path):
    worker.save_hf(tmp_path / "model", source_dir=None)
    one = LocalEngine.from_folder(tmp_path / "model", max_batch_size=8, max_context=64)
    yield one
    run_async(one.close())


@pytest.fixture
def sync(worker, tmp_path):
    return WeightSync.build(FLOAT32, worker, engine_kind="local", folder=tmp_path)


def corrupt(engine):
    """Change one column of one served matrix, as a torn write would."""
    weights = engine._decoder.weights
    layer = weights.layers[1]
    broken = layer.down_FH.clone()
    broken[:, 5] += 0.5
    layers = (weights.layers[0], dataclasses.replace(layer, down_FH=broken))
    engine._decoder.weights = dataclasses.replace(weights, layers=layers)


def sample(engine):
    params = SamplingParams(max_new_tokens=12, temperature=TEMPERATURE)
    requests = [
        GenerationRequest((3 + n // 2, 5, 8), dataclasses.replace(params, seed=n)) for n in range(8)
    ]
    return [
        Rollout(
            Problem(f"p{n // 2}", "?"),
            n // 2,
            request.prompt_ids,
            done.token_ids,
            done.logprobs,
            done.weight_versions,
            "",
            str(done.finish_reason),
        )
        for n, (request, done) in enumerate(
            zip(requests, run_async(generate_all(engine, requests)))
        )
    ]


def train(worker, rollouts, gate, updates=1):
    several = ClippedLoss(num_minibatches=updates) if updates > 1 else LossConfig()
    config = RLConfig(
        loss=several,
        prompts_per_step=4,
        sampling=SamplingConfig(temperature=TEMPERATURE),
    )
    advantages_N = torch.tensor([1.0, -1.0] * 4)
    return train_on_rollouts(
        worker, rollouts, advantages_N, config, tokens_per_micro_batch=40, gate=gate
    )


def weights(worker):
    return {name: tensor.clone() for name, tensor in worker.export_hf()}


@pytest.mark.parametrize("updates", [1, 2])
def test_the_gate_passes_for_the_same_weights(perturbed, engine, sync, updates):
    """After a sync, engine and trainer agree to float32 rounding on tokens sampled at a
    temperature: the step is made, and reports the mismatch and a KL estimate. The gate costs no
    forward pass.
    """
    run_async(sync.push(perturbed, engine, 1))
    passes = []
    perturbed.logprobs, logprobs = (
        lambda *a, **k: passes.append(1) or logprobs(*a, **k),
        perturbed.logprobs,
    )
    try:
        metrics = train(perturbed, sample(engine), FirstStepGate(FLOAT32), updates)
    finally:
        del perturbed.logprobs
    assert len(passes) == (updates if updates > 1 else 0)  # the old log-probabilities need them
    assert (
        metrics["engine_logprob_diff_mean"] < 1e-4
        and abs(metrics["engine_kl"]) < 1e-6
        and metrics["grad_norm"] > 0
    )


@pytest.mark.parametrize("updates", [1, 2])
def test_a_corrupted_tensor_fails_the_gate(perturbed, engine, sync, updates):
    """Without checksums the step fails, no weight changes, and the error names bounds, tensor and
    tokens.
    """
    run_async(sync.push(perturbed, engine, 1))
    corrupt(engine)
    before = weights(perturbed)
    gate = FirstStepGate(
        FLOAT32, lambda: run_async(sync.differing_tensors(perturbed, engine)), lambda id: f"<{id}>"
    )
    with pytest.raises(WeightMismatch) as caught:
        train(perturbed, sample(engine), gate, updates)
    message = str(caught.value)
    assert (
        "weight_sync.max_mean_mismatch=0.0001 and weight_sync.max_token_mismatch=0.001" in message
    )
    assert (
        "tensors that differ: model.layers.1.mlp.down_proj.weight;" in message and "'<" in message
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in perturbed.export_hf())


def test_the_checksum_finds_it_first(perturbed, engine, sync):
    """An engine that corrupts a tensor while loading fails the push with the tensor's name."""
    update = engine.update_weights

    async def torn(tensors, version):
        await update(tensors, version)
        corrupt(engine)

    engine.update_weights = torn
    with pytest.raises(
        EngineFailure, match=r"1 of \d+ tensors .*model.layers.1.mlp.down_proj.weight"
    ):
        run_async(sync.push(perturbed, engine, 1))


def test_equal_weights_with_other_results_are_reported(perturbed, engine, sync):
    """A wrong rotary base is not in any tensor: the gate fails and reports that all are equal."""
    run_async(sync.push(perturbed, engine, 1))
    engine._decoder._rotary_TP = engine._decoder._rotary_TP.conj().resolve_conj()
    gate = FirstStepGate(FLOAT32, lambda: run_async(sync.differing_tensors(perturbed, engine)))
    with pytest.raises(WeightMismatch, match="all tensors are equal by checksum"):
        train(perturbed, sample(engine), gate)


def test_every_served_tensor_is_hashed(perturbed, engine, sync):
    """A change of any fused tensor of the embedded engine changes a checksum, the copy of a tied
    head included.
    """
    run_async(sync.push(perturbed, engine, 1))
    (before,) = run_async(engine.weights_checksum())
    served = engine._decoder.weights
    for name in ("embed_VH", "norm_H", "head_HV"):
        engine._decoder.weights = dataclasses.replace(
            served, **{name: getattr(served, name) + 1e-3}
        )
        assert run_async(engine.weights_checksum()) != [before], name
    for field in dataclasses.fields(served.layers[0]):
        layer = dataclasses.replace(
            served.layers[0], **{field.name: getattr(served.layers[0], field.name) * 1.01}
        )
        engine._decoder.weights = dataclasses.replace(served, layers=(layer, served.layers[1]))
        assert run_async(engine.weights_checksum()) != [before], field.name


def test_nan_does_not_pass():
    """NaN counts as an infinite difference: every comparison with NaN itself is false."""
    gate = FirstStepGate(WeightSyncConfig(max_mean_mismatch=1.0))
    row = torch.zeros(3)
    gate.observe(torch.tensor([0.0, float("nan"), 0.0]), row, row.long(), row == 0)
    with pytest.raises(WeightMismatch, match="inf nats on average"):
        gate.decide()


def test_mean_and_token_bounds_are_independent():
    """One token far off passes the bound on the mean and fails the bound on tokens. Masked tokens
    are not in the mean.
    """
    logprobs, tokens = torch.zeros(100), torch.arange(100)
    logprobs[7] = -3.0
    inside = tokens != 50
    logprobs[50] = -1000.0
    for settings, passes in (
        (WeightSyncConfig(max_mean_mismatch=0.031), True),
        (WeightSyncConfig(max_mean_mismatch=0.03), False),
        (WeightSyncConfig(max_mean_mismatch=None, max_token_mismatch=2.0), False),
        (WeightSyncConfig(max_mean_mismatch=None), True),
    ):
        gate = FirstStepGate(settings)
        gate.observe(torch.zeros(100), logprobs, tokens, inside)
        if passes:
            found = gate.decide()
            assert (
                found.num_tokens == 99
                and found.worst[0].token_id == 7
                and found.mean == pytest.approx(3 / 99)
            )
        else:
            with pytest.raises(WeightMismatch):
                gate.decide()
