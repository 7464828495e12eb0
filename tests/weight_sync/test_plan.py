"""The sync plan for the published shapes of real models: no weights, no processes, only numbers.

shapes/*.json hold the numbers of the published config.json files; each names its source.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spark_nemo.config import ConfigError
from spark_nemo.megatron import hf_weights
from spark_nemo.megatron.model_shape import ModelShape
from spark_nemo.weight_sync.engine_view import engine_tensors
from spark_nemo.weight_sync.numbers import ModelNumbers, checkpoint_tensors
from spark_nemo.weight_sync.plan import plan_sync

SHAPES = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "shapes").glob("*.json"))}
SIZES = (1, 2, 4, 8)
BUCKET = 512 << 20
REFUSED = {("qwen2.5-7b", "tp", 8): "28 attention heads", ("qwen2.5-7b", "pp", 8): "28 layers",
           ("qwen2.5-7b", "engine", 8): "28 attention heads", ("qwen2.5-3b", "pp", 8): "36 layers"}
"""What the model cannot be split into, and the number that the error names."""


def plan(model, tp=1, pp=1, engine=1, bucket=BUCKET):
    config = SHAPES[model]
    tensors = checkpoint_tensors(ModelNumbers.from_config(config))
    return plan_sync(tensors, "bfloat16", config, tensor_parallel=tp, pipeline_parallel=pp,
                     engine_tensor_parallel=engine, bucket_bytes=bucket)


def covers(ranges, length):
    """Do these [start, stop) ranges cover 0..length, each element once?"""
    ordered = sorted(ranges)
    return ordered[0][0] == 0 and ordered[-1][1] == length and all(a[1] == b[0] for a, b in pairwise(ordered))


def once_per_element(slices, shape):
    """Every element of a tensor is in exactly one of ``slices``, or in all of them whole (a replica on every rank)."""
    held = [s for s in slices if s is not None]
    columns = (0, shape[1]) if len(shape) == 2 else None
    if all(s.rows == (0, shape[0]) and s.columns == columns for s in held):
        return len(held) == len(slices)
    if all(s.columns == columns for s in held):
        return covers([s.rows for s in held], shape[0])
    return all(s.rows == (0, shape[0]) for s in held) and covers([s.columns for s in held], shape[1])


@pytest.mark.parametrize("pp", SIZES)
@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("model", SHAPES)
def test_every_combination(model, tp, pp):
    """For each of TP, PP and engine TP in 1, 2, 4, 8: every element of every tensor is held by exactly one rank of each
    stage that has the tensor (or whole by all of them), buckets send every tensor once, and memory stays under a bucket
    and a tensor. What the model cannot be split into is refused with the number in the error."""
    refusal = REFUSED.get((model, "tp", tp)) or REFUSED.get((model, "pp", pp))
    if refusal:
        with pytest.raises(ConfigError, match=refusal):
            plan(model, tp, pp)
        return
    first = plan(model, tp, pp)
    for tensor in first.tensors:
        assert tensor.sources and all(once_per_element(source.slices, tensor.shape) for source in tensor.sources)
        assert all(len(source.slices) == tp and 0 <= source.pp_rank < pp for source in tensor.sources)
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
        assert full.engine_ranks == tuple(engine_tensors(numbers, engine, rank) for rank in range(engine))
        assert [name for bucket in full.buckets for name in bucket] == [tensor.name for tensor in full.tensors]
        assert full.peak_bytes <= BUCKET + full.largest_bytes < full.total_bytes


@pytest.mark.parametrize("engine", SIZES)
@pytest.mark.parametrize("model", SHAPES)
def test_engine_parameters_are_covered_exactly_once(model, engine):
    """The pieces of an engine parameter fill its rows from the first to the last at its full width, padding is zeros at
    the end only, and together the ranks use every element of the checkpoint."""
    if (model, "engine", engine) in REFUSED:
        pytest.skip("refused; see test_every_combination")
    numbers = ModelNumbers.from_config(SHAPES[model])
    shapes = checkpoint_tensors(numbers)
    used = {name: [] for name in shapes}
    for rank in range(engine):
        tensors = engine_tensors(numbers, engine, rank)
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        for tensor in tensors:
            assert sum(piece.slice.height for piece in tensor.pieces) == tensor.shape[0]
            assert all(piece.slice.width == (tensor.shape[1] if len(tensor.shape) == 2 else 1)
                       for piece in tensor.pieces)
            assert all(piece.name is not None for piece in tensor.pieces[:-1])
            for piece in tensor.pieces:
                if piece.name is not None:
                    used[piece.name].append(piece.slice)
    for name, slices in used.items():
        copies = max(1, engine // numbers.num_kv_heads) if ".k_proj." in name or ".v_proj." in name else 1
        unique = list(dict.fromkeys(slices))
        assert once_per_element(unique, shapes[name]) and len(slices) in (len(unique) * copies, engine), name


def test_more_ranks_than_key_value_heads():
    """Qwen2.5-3B has 2 key-value heads: at TP 8 megatron-core cuts a group (8 query heads, k, v) into 4 pieces, of
    which the last holds the key, the value and half a query head; SGLang gives each head to 4 ranks."""
    full = plan("qwen2.5-3b", tp=8, engine=8)
    held = {name: tensor.sources[0].slices for tensor in full.tensors
            if (name := tensor.name.removeprefix("model.layers.0.self_attn.")) in ("q_proj.weight", "k_proj.weight")}
    assert [s and s.rows for s in held["k_proj.weight"]] == [None, None, None, (0, 128), None, None, None, (128, 256)]
    assert [s.rows for s in held["q_proj.weight"]] == [
        (0, 320), (320, 640), (640, 960), (960, 1024), (1024, 1344), (1344, 1664), (1664, 1984), (1984, 2048)]
    rows = [next(p.slice.rows for t in rank for p in t.pieces if p.name == "model.layers.0.self_attn.k_proj.weight")
            for rank in full.engine_ranks]
    assert rows == [(0, 128)] * 4 + [(128, 256)] * 4


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_slices_are_what_the_trainer_shards(family, tp):
    """The plan's slices hold exactly the values that ``hf_weights`` puts on each rank when it loads, also with 8 ranks
    for 2 key-value heads. Every element has its own number, so a wrong row would show."""
    config = {"model_type": family, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4,
              "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 70, "tie_word_embeddings": False}
    shape, numbers = ModelShape.from_hf(config), ModelNumbers.from_config(config)
    shapes = checkpoint_tensors(numbers)
    full = plan_sync(shapes, "float32", config, tensor_parallel=tp, pipeline_parallel=2, engine_tensor_parallel=1,
                     bucket_bytes=1 << 20)
    planned = {tensor.name: tensor for tensor in full.tensors}
    for placed in hf_weights.placed_rules(shape, 2):
        sizes = [torch.Size(size).numel() for size in placed.hf.values()]
        tensors = [part.view(size) for part, size in zip(
            torch.arange(1, sum(sizes) + 1).split(sizes), placed.hf.values())]
        for rank, shard in enumerate(placed.rule.transform.to_shards(tensors, shape, tp)):
            held = []
            for name, tensor in zip(placed.hf, tensors):
                source = next(s for s in planned[name].sources if s.pp_rank == placed.stage)
                if (part := source.slices[rank]) is not None:
                    rows = tensor[part.rows[0]:part.rows[1]]
                    held.append(rows.flatten() if part.columns is None else rows[:, slice(*part.columns)].flatten())
            found = torch.cat(held).sort().values if held else torch.zeros(0)
            assert torch.equal(found, shard[shard > 0].flatten().sort().values), (placed.megatron, rank)


def test_the_trainer_exports_what_the_plan_says():
    """Names, shapes and order of the plan are those of the trainer's own export, for every family of both."""
    for model, config in SHAPES.items():
        shapes = hf_weights.hf_tensor_shapes(ModelShape.from_hf(config))
        assert list(shapes.items()) == list(checkpoint_tensors(ModelNumbers.from_config(config)).items()), model


@pytest.mark.parametrize(("change", "message"), [
    ({"model.norm.weight": None}, "model.norm.weight is missing"),
    ({"model.extra.weight": (3,)}, "model.extra.weight has no place"),
    ({"model.norm.weight": (3,)}, "shape .3,., config.json says .2048,."),
])
def test_tensors_that_do_not_fit_are_named(change, message):
    """A checkpoint that is not the configuration's is refused by name, before anything is sent."""
    config = SHAPES["qwen2.5-3b"]
    tensors = {**checkpoint_tensors(ModelNumbers.from_config(config)), **change}
    tensors = {name: shape for name, shape in tensors.items() if shape is not None}
    with pytest.raises(ConfigError, match=message):
        plan_sync(tensors, "bfloat16", config, tensor_parallel=1, pipeline_parallel=1, engine_tensor_parallel=1,
                  bucket_bytes=1)


def test_a_tensor_larger_than_a_bucket_travels_alone():
    """With a bucket of one byte every tensor is its own bucket and the buffer is empty."""
    tiny = plan("qwen2.5-3b", bucket=1)
    assert all(len(bucket) == 1 for bucket in tiny.buckets) and tiny.buffer_bytes == 0
