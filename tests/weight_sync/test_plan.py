"""Sync plans for the published sizes of real models, without weights or processes.

shapes/*.json hold the sizes of the published config.json files; each names its source.
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from spark_nemo.config import ConfigError
from spark_nemo.models.param_mapping import hf_tensor_shapes
from spark_nemo.models.spec import ModelSpec
from spark_nemo.weight_sync.engine_view import check_server_args, engine_tensors
from spark_nemo.weight_sync.sync_plan import plan_sync

SHAPES = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "shapes").glob("*.json"))
}
SIZES = (1, 2, 4, 8)
BUCKET = 512 << 20
NO_ENGINE = {("qwen2.5-7b", 8): "28 attention heads"}
"""Engine layouts that do not divide a model, and the number that the error names."""


def spec_of(model, **changes):
    return ModelSpec.from_hf(SHAPES[model] | changes)


def plan(model, tp=1, engine=1, bucket=BUCKET):
    return plan_sync(
        spec_of(model),
        "bfloat16",
        tensor_parallel=tp,
        engine_tensor_parallel=engine,
        bucket_bytes=bucket,
    )


def covers(ranges, length):
    """Return True if these [start, stop) ranges cover 0..length, each element once."""
    ordered = sorted(ranges)
    return (
        ordered[0][0] == 0
        and ordered[-1][1] == length
        and all(a[1] == b[0] for a, b in pairwise(ordered))
    )


def once_per_element(slices, shape):
    """Return True if each element is in one of ``slices``, or the whole tensor in each of them."""
    held = [s for s in slices if s is not None]
    columns = (0, shape[1]) if len(shape) == 2 else None
    if all(s.rows == (0, shape[0]) and s.columns == columns for s in held):
        return len(held) == len(slices)
    if all(s.columns == columns for s in held):
        return covers([s.rows for s in held], shape[0])
    return all(s.rows == (0, shape[0]) for s in held) and covers(
        [s.columns for s in held], shape[1]
    )


@pytest.mark.parametrize("engine", SIZES)
@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("model", SHAPES)
def test_buckets_and_memory(model, tp, engine):
    """Buckets send every tensor of the export once and in its order, and memory stays under a
    bucket and a tensor. An engine layout that does not divide the model is named in the error.
    """
    if (model, engine) in NO_ENGINE:
        with pytest.raises(ConfigError, match=NO_ENGINE[model, engine]):
            plan(model, tp, engine)
        return
    full = plan(model, tp, engine)
    names = [name for bucket in full.buckets for name in bucket]
    assert names == list(hf_tensor_shapes(spec_of(model)))
    assert len(full.engine_ranks) == engine
    assert full.peak_bytes <= BUCKET + full.largest_bytes < full.total_bytes


@pytest.mark.parametrize("engine", SIZES)
@pytest.mark.parametrize("model", SHAPES)
def test_engine_parameters_are_covered_exactly_once(model, engine):
    """The pieces of an engine parameter fill its rows from the first to the last at its full width,
    padding is zeros at the end only, and together the ranks use every element of the checkpoint.
    """
    if (model, engine) in NO_ENGINE:
        pytest.skip("rejected; see test_buckets_and_memory")
    spec = spec_of(model)
    shapes = hf_tensor_shapes(spec)
    used = {name: [] for name in shapes}
    for rank in range(engine):
        tensors = engine_tensors(spec, engine, rank)
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        for tensor in tensors:
            rows, width = (
                (math.prod(tensor.shape[:-1]), tensor.shape[-1])
                if len(tensor.shape) > 1
                else (tensor.shape[0], 1)
            )
            assert sum(piece.slice.height for piece in tensor.pieces) == rows
            assert all(piece.slice.width == width for piece in tensor.pieces)
            assert all(piece.name is not None for piece in tensor.pieces[:-1])
            for piece in tensor.pieces:
                if piece.name is not None:
                    used[piece.name].append(piece.slice)
    for name, slices in used.items():
        copies = (
            max(1, engine // spec.num_kv_heads) if ".k_proj." in name or ".v_proj." in name else 1
        )
        unique = list(dict.fromkeys(slices))
        assert once_per_element(unique, shapes[name]) and len(slices) in (
            len(unique) * copies,
            engine,
        ), name


def test_more_ranks_than_key_value_heads():
    """Qwen2.5-3B has 2 key-value heads: with 8 ranks SGLang gives each head to 4 of them."""
    full = plan("qwen2.5-3b", engine=8)
    rows = [
        next(
            p.slice.rows
            for t in rank
            for p in t.pieces
            if p.name == "model.layers.0.self_attn.k_proj.weight"
        )
        for rank in full.engine_ranks
    ]
    assert rows == [(0, 128)] * 4 + [(128, 256)] * 4


def test_experts_are_stacked_in_the_engine():
    """Two ranks: each has of every expert half the rows of gate, then of up, and half the columns
    of down; the router whole. That SGLang's own module has these names, shapes and values is
    tests/real_sglang/test_experts.py.
    """
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
    }
    second = engine_tensors(ModelSpec.from_hf(config | {"head_dim": 4}), 2, 1)
    held = {
        tensor.name.removeprefix("model.layers.0.mlp."): tensor
        for tensor in second
        if ".mlp." in tensor.name
    }
    assert {name: tensor.shape for name, tensor in held.items()} == {
        "gate.weight": (3, 16),
        "experts.w13_weight": (3, 8, 16),
        "experts.w2_weight": (3, 16, 4),
    }
    rows = [
        (piece.name.split("experts.")[1], piece.slice.rows)
        for piece in held["experts.w13_weight"].pieces
    ]
    assert rows == [(f"{e}.{x}_proj.weight", (4, 8)) for e in range(3) for x in ("gate", "up")]
    assert {(p.slice.rows, p.slice.columns) for p in held["experts.w2_weight"].pieces} == {
        ((0, 16), (4, 8))
    }


def test_a_tied_head_with_experts_is_rejected():
    """SGLang would never load it."""
    with pytest.raises(ConfigError, match="does not tie the head"):
        plan_sync(
            spec_of("qwen3-30b-a3b", tie_word_embeddings=True),
            "bfloat16",
            tensor_parallel=1,
            engine_tensor_parallel=1,
            bucket_bytes=1,
        )


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        ({"num_experts": 12}, 16, "16 tensor-parallel ranks needs as many experts, .* has 12"),
        ({"moe_intermediate_size": 12}, 8, "divide the model's 12 ffn rows of an expert"),
    ],
)
def test_experts_that_cannot_be_split_are_named(change, tp, message):
    """The error names the number that the engine's tensor parallelism does not divide."""
    with pytest.raises(ConfigError, match=message):
        engine_tensors(spec_of("qwen3-30b-a3b", **change), tp, 0)


@pytest.mark.parametrize(
    "words",
    [
        ["--ep-size", "2"],
        ["--ep=2"],
        ["--enable-eplb"],
        ["--moe-a2a-backend", "deepep"],
        ["--moe-runner-backend", "flashinfer_trtllm"],
        ["--moe-runner-backend=flashinfer_cutlass"],
    ],
)
def test_other_layouts_of_experts_are_rejected(words):
    """Arguments that change SGLang's layout of experts are rejected, but not for a dense model; the
    plan is for Triton's kernels.
    """
    mixture = spec_of("qwen3-30b-a3b")
    with pytest.raises(ConfigError, match=f"engine.policy.server_args: {words[0].split('=')[0]} "):
        check_server_args(
            mixture,
            ["--mem-fraction-static", "0.8", *words],
            "engine.policy.server_args",
        )
    check_server_args(spec_of("qwen3-32b"), words, "engine.policy.server_args")
    check_server_args(mixture, ["--moe-runner-backend", "triton"], "engine.policy.server_args")


def test_a_tensor_larger_than_a_bucket_is_sent_alone():
    """With a bucket of one byte every tensor is its own bucket and the buffer is empty."""
    tiny = plan("qwen2.5-3b", bucket=1)
    assert all(len(bucket) == 1 for bucket in tiny.buckets) and tiny.buffer_bytes == 0
