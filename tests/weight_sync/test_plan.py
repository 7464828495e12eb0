"""The sync plan for the published shapes of real models: no weights, no processes, only numbers.

shapes/*.json hold the numbers of the published config.json files; each names its source.
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spark_nemo.config import ConfigError
from spark_nemo.megatron import hf_weights
from spark_nemo.megatron.model_shape import ModelShape
from spark_nemo.weight_sync.engine_view import check_server_args, engine_tensors
from spark_nemo.weight_sync.numbers import ModelNumbers, checkpoint_tensors
from spark_nemo.weight_sync.sync_plan import plan_sync

SHAPES = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "shapes").glob("*.json"))
}
SIZES = (1, 2, 4, 8)
BUCKET = 512 << 20
REFUSED = {
    ("qwen2.5-7b", "tp", 8): "28 attention heads",
    ("qwen2.5-7b", "pp", 8): "28 layers",
    ("qwen2.5-7b", "engine", 8): "28 attention heads",
    ("qwen2.5-3b", "pp", 8): "36 layers",
}
"""What the model cannot be split into, and the number that the error names."""
MIXTURES = [("qwen3_moe", 1), ("qwen3_moe", 2), ("qwen3_moe", 8)]
"""Family, expert parallel."""


def plan(model, tp=1, pp=1, engine=1, bucket=BUCKET, ep=1):
    config = SHAPES[model]
    tensors = checkpoint_tensors(ModelNumbers.from_config(config))
    return plan_sync(
        tensors,
        "bfloat16",
        config,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        engine_tensor_parallel=engine,
        bucket_bytes=bucket,
        expert_parallel=ep,
    )


def covers(ranges, length):
    """Do these [start, stop) ranges cover 0..length, each element once?"""
    ordered = sorted(ranges)
    return (
        ordered[0][0] == 0
        and ordered[-1][1] == length
        and all(a[1] == b[0] for a, b in pairwise(ordered))
    )


def once_per_element(slices, shape):
    """Every element of a tensor is in exactly one of ``slices``, or in all of them whole (a replica
    on every rank).
    """
    held = [s for s in slices if s is not None]
    columns = (0, shape[1]) if len(shape) == 2 else None
    if all(s.rows == (0, shape[0]) and s.columns == columns for s in held):
        return len(held) == len(slices)
    if all(s.columns == columns for s in held):
        return covers([s.rows for s in held], shape[0])
    return all(s.rows == (0, shape[0]) for s in held) and covers(
        [s.columns for s in held], shape[1]
    )


@pytest.mark.parametrize("pp", SIZES)
@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("model", SHAPES)
def test_every_combination(model, tp, pp):
    """For each of TP, PP and engine TP in 1, 2, 4, 8: every element of every tensor is held by
    exactly one rank of each stage that has the tensor (or whole by all of them), buckets send every
    tensor once, and memory stays under a bucket and a tensor. What the model cannot be split into
    is refused with the number in the error.
    """
    refusal = REFUSED.get((model, "tp", tp)) or REFUSED.get((model, "pp", pp))
    if refusal:
        with pytest.raises(ConfigError, match=refusal):
            plan(model, tp, pp)
        return
    first = plan(model, tp, pp)
    for tensor in first.tensors:
        assert tensor.sources and all(
            once_per_element(source.slices, tensor.shape) for source in tensor.sources
        )
        holders = 1 if ".experts." in tensor.name else tp
        assert all(
            len(source.slices) == holders and 0 <= source.pp_rank < pp for source in tensor.sources
        )
    stages = {source.pp_rank for tensor in first.tensors for source in tensor.sources}
    assert stages == set(range(pp))
    for engine in SIZES:
        if refusal := REFUSED.get((model, "engine", engine)):
            with pytest.raises(ConfigError, match=refusal):
                plan(model, tp, pp, engine)
            continue
        full = plan(model, tp, pp, engine)
        assert full.tensors == first.tensors
        numbers = ModelNumbers.from_config(SHAPES[model])
        assert full.engine_ranks == tuple(
            engine_tensors(numbers, engine, rank) for rank in range(engine)
        )
        assert [name for bucket in full.buckets for name in bucket] == [
            tensor.name for tensor in full.tensors
        ]
        assert full.peak_bytes <= BUCKET + full.largest_bytes < full.total_bytes


@pytest.mark.parametrize("engine", SIZES)
@pytest.mark.parametrize("model", SHAPES)
def test_engine_parameters_are_covered_exactly_once(model, engine):
    """The pieces of an engine parameter fill its rows from the first to the last at its full width,
    padding is zeros at the end only, and together the ranks use every element of the checkpoint.
    """
    if (model, "engine", engine) in REFUSED:
        pytest.skip("refused; see test_every_combination")
    numbers = ModelNumbers.from_config(SHAPES[model])
    shapes = checkpoint_tensors(numbers)
    used = {name: [] for name in shapes}
    for rank in range(engine):
        tensors = engine_tensors(numbers, engine, rank)
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
            max(1, engine // numbers.num_kv_heads)
            if ".k_proj." in name or ".v_proj." in name
            else 1
        )
        unique = list(dict.fromkeys(slices))
        assert once_per_element(unique, shapes[name]) and len(slices) in (
            len(unique) * copies,
            engine,
        ), name


def test_more_ranks_than_key_value_heads():
    """Qwen2.5-3B has 2 key-value heads: at TP 8 megatron-core cuts a group (8 query heads, k, v)
    into 4 pieces, of which the last holds the key, the value and half a query head; SGLang gives
    each head to 4 ranks.
    """
    full = plan("qwen2.5-3b", tp=8, engine=8)
    held = {
        name: tensor.sources[0].slices
        for tensor in full.tensors
        if (name := tensor.name.removeprefix("model.layers.0.self_attn."))
        in ("q_proj.weight", "k_proj.weight")
    }
    assert [s and s.rows for s in held["k_proj.weight"]] == [
        None,
        None,
        None,
        (0, 128),
        None,
        None,
        None,
        (128, 256),
    ]
    assert [s.rows for s in held["q_proj.weight"]] == [
        (0, 320),
        (320, 640),
        (640, 960),
        (960, 1024),
        (1024, 1344),
        (1344, 1664),
        (1664, 1984),
        (1984, 2048),
    ]
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


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize(("family", "ep"), [("qwen2", 1), ("qwen3", 1), ("llama", 1), *MIXTURES])
def test_slices_are_what_the_trainer_shards(family, ep, tp):
    """The plan's slices hold exactly the values that ``hf_weights`` puts on each rank when it
    loads, also with 8 ranks for 2 key-value heads; an expert is whole on the expert-parallel rank
    that ``hf_weights`` gives it to. Every element has its own number, so a wrong row would show.
    """
    config = {
        "model_type": family,
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "head_dim": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 70,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    }
    shape, numbers = ModelShape.from_hf(config), ModelNumbers.from_config(config)
    shapes = checkpoint_tensors(numbers)
    full = plan_sync(
        shapes,
        "float32",
        config,
        tensor_parallel=tp,
        pipeline_parallel=2,
        engine_tensor_parallel=1,
        bucket_bytes=1 << 20,
        expert_parallel=ep,
    )
    planned = {tensor.name: tensor for tensor in full.tensors}
    for placed in hf_weights.placed_rules(shape, 2, ep):
        sizes = [torch.Size(size).numel() for size in placed.hf.values()]
        tensors = [
            part.view(size)
            for part, size in zip(torch.arange(1, sum(sizes) + 1).split(sizes), placed.hf.values())
        ]
        shards = tp if placed.expert is None else 1
        for rank, shard in enumerate(placed.rule.transform.to_shards(tensors, shape, shards)):
            held = []
            for name, tensor in zip(placed.hf, tensors):
                source = next(s for s in planned[name].sources if s.pp_rank == placed.stage)
                assert source.ep_rank == placed.expert_rank and len(source.slices) == shards
                if (part := source.slices[rank]) is not None:
                    rows = tensor[part.rows[0] : part.rows[1]]
                    held.append(
                        rows.flatten()
                        if part.columns is None
                        else rows[:, slice(*part.columns)].flatten()
                    )
            found = torch.cat(held).sort().values if held else torch.zeros(0)
            assert torch.equal(found, shard[shard > 0].flatten().sort().values), (
                placed.megatron,
                rank,
            )


def test_the_trainer_exports_what_the_plan_says():
    """Names, shapes and order of the plan are those of the trainer's own export, for every family
    of both.
    """
    for model, config in SHAPES.items():
        shapes = hf_weights.hf_tensor_shapes(ModelShape.from_hf(config))
        assert list(shapes.items()) == list(
            checkpoint_tensors(ModelNumbers.from_config(config)).items()
        ), model


@pytest.mark.parametrize("ep", [1, 2, 8, 128])
def test_an_expert_is_whole_on_one_expert_parallel_rank(ep):
    """Qwen3-30B-A3B: consecutive experts of every layer share a rank, all ranks have as many, and
    which it is changes nothing about what is sent in which order.
    """
    full = plan("qwen3-30b-a3b", tp=2, pp=2, ep=ep)
    for tensor in full.tensors:
        (source,) = tensor.sources
        if ".experts." not in tensor.name:
            assert source.ep_rank is None
            continue
        expert = int(tensor.name.split(".experts.")[1].split(".")[0])
        assert source.ep_rank == expert * ep // 128
    alone = plan("qwen3-30b-a3b")
    assert [(t.name, t.shape) for t in full.tensors] == [(t.name, t.shape) for t in alone.tensors]
    assert full.buckets == alone.buckets and full.engine_ranks == alone.engine_ranks


def test_experts_lie_below_each_other_in_the_engine():
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
    }
    _, second = (engine_tensors(ModelNumbers.from_config(config), 2, rank) for rank in (0, 1))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": True}, "does not tie the head"),
        ({"mlp_only_layers": [3]}, "every layer must have experts"),
        ({"decoder_sparse_step": 2}, "every layer must have experts"),
        ({"num_experts": None}, "must both be set"),
        ({"moe_intermediate_size": 0}, "must both be set"),
    ],
)
def test_mixtures_without_a_plan_are_refused(change, message):
    """Layers without experts, and a tied head, which SGLang would never load."""
    with pytest.raises(ConfigError, match=message):
        ModelNumbers.from_config({**SHAPES["qwen3-30b-a3b"], **change})


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({}, {"expert_parallel": 3}, "expert_parallel=3 does not divide the model's 128 experts"),
        (
            {"num_experts": 12},
            {"engine_tensor_parallel": 16},
            "16 tensor-parallel ranks needs as many experts, .* has 12",
        ),
        (
            {"moe_intermediate_size": 12},
            {"engine_tensor_parallel": 8},
            "divide the model's 12 ffn rows of an expert",
        ),
    ],
)
def test_experts_that_cannot_be_split_are_named(change, layout, message):
    """The trainer's expert parallelism and the engine's tensor parallelism, with the number that
    does not divide.
    """
    config = SHAPES["qwen3-30b-a3b"] | change
    sizes = {"tensor_parallel": 1, "pipeline_parallel": 1, "engine_tensor_parallel": 1} | layout
    with pytest.raises(ConfigError, match=message):
        plan_sync(
            checkpoint_tensors(ModelNumbers.from_config(config)),
            "bfloat16",
            config,
            bucket_bytes=1,
            **sizes,
        )


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
def test_other_layouts_of_experts_are_refused(words):
    """Server arguments under which SGLang stores experts in another way than the plan says; a dense
    model may have them, and Triton's kernels are what the plan is for.
    """
    numbers = {
        name: ModelNumbers.from_config(SHAPES[name]) for name in ("qwen3-30b-a3b", "qwen3-32b")
    }
    with pytest.raises(ConfigError, match=f"engine.policy.server_args: {words[0].split('=')[0]} "):
        check_server_args(
            numbers["qwen3-30b-a3b"],
            ["--mem-fraction-static", "0.8", *words],
            "engine.policy.server_args",
        )
    check_server_args(numbers["qwen3-32b"], words, "engine.policy.server_args")
    check_server_args(
        numbers["qwen3-30b-a3b"], ["--moe-runner-backend", "triton"], "engine.policy.server_args"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.extra.weight": (3,)}, "model.extra.weight has no place"),
        ({"model.norm.weight": (3,)}, "shape .3,., config.json says .2048,."),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    """A checkpoint that is not the configuration's is refused by name, before anything is sent."""
    config = SHAPES["qwen2.5-3b"]
    tensors = {**checkpoint_tensors(ModelNumbers.from_config(config)), **change}
    tensors = {name: shape for name, shape in tensors.items() if shape is not None}
    with pytest.raises(ConfigError, match=message):
        plan_sync(
            tensors,
            "bfloat16",
            config,
            tensor_parallel=1,
            pipeline_parallel=1,
            engine_tensor_parallel=1,
            bucket_bytes=1,
        )


def test_a_tensor_larger_than_a_bucket_travels_alone():
    """With a bucket of one byte every tensor is its own bucket and the buffer is empty."""
    tiny = plan("qwen2.5-3b", bucket=1)
    assert all(len(bucket) == 1 for bucket in tiny.buckets) and tiny.buffer_bytes == 0
