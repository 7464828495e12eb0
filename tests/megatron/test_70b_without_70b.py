"""Models of up to 72 billion parameters on the meta device, dense and with experts.

No weight is allocated, no rank but this process runs.

Proves names, shapes, counts and coverage for the layouts that the recipes use; a wrong order of
rows inside a tensor would not show here (tests/weight_sync/test_plan.py and test_four_ranks.py see
it, on small models).
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import meta_ranks
import pytest
import torch

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.hf_weights import placed_rules
from spark_nemo.megatron.model_shape import ModelShape
from spark_nemo.megatron.sizing.parameters import stage_parameters
from spark_nemo.weight_sync.numbers import ModelNumbers, checkpoint_tensors
from spark_nemo.weight_sync.sync_plan import plan_sync

SHAPES = Path(__file__).parents[1] / "weight_sync" / "shapes"
CASES = [
    ("qwen2.5-72b", 8, 4),
    ("qwen2.5-72b", 8, 8),
    ("llama-3.1-70b", 8, 4),
    ("llama-3.1-70b", 8, 8),
    ("qwen3-32b", 8, 2),
    ("qwen3-32b", 4, 4),
    ("qwen2.5-14b", 8, 1),
    ("qwen2.5-14b", 4, 4),
    ("qwen2.5-7b", 4, 1),
    ("qwen2.5-7b", 4, 2),
]
"""Model, tensor and pipeline parallel. Qwen2.5-Math-7B has the sizes of Qwen2.5-7B."""
MIXTURE = "qwen3-30b-a3b"
EXPERT_CASES = [(4, 2, 1, 4), (4, 2, 2, 8), (1, 2, 4, 4), (2, 4, 2, 2)]
"""Tensor, pipeline, data and expert parallel."""


def case(model, tp, pp, dp=1, ep=1):
    config = json.loads((SHAPES / f"{model}.json").read_text())
    layout = MegatronConfig(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=dp,
        expert_parallel=ep,
        sequence_parallel=tp > 1,
    )
    return config, ModelShape.from_hf(config), layout


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tp", "pp"), CASES)
def test_every_stage_is_built_as_the_table_says(model, tp, pp):
    """The module that Megatron really builds has the names and shapes that the table has for it, so
    every parameter is loaded and none has two rules, and ``sizing`` counts it exactly. Built for
    every stage on its first tensor rank, and on the last stage's last one; the ranks between run
    the same code with the same sizes.
    """
    _, shape, layout = case(model, tp, pp)
    expected = stage_parameters(shape, layout)
    for rank in [*range(0, tp * pp, tp), tp * pp - 1]:
        (tp_rank, stage), built = meta_ranks.built_parameters(shape, layout, rank)
        assert (tp_rank, stage) == (rank % tp, rank // tp)
        assert built == expected[stage].all
        assert expected[stage].num_elements == sum(math.prod(size) for size in built.values())


@pytest.mark.parametrize(("model", "tp", "pp"), CASES)
def test_mapping_covers_every_tensor_once(model, tp, pp):
    """On all tensor ranks of all stages together: each Hugging Face tensor is in one rule (an
    independent list has the same names and shapes), its shards have its elements and no more than
    the vocabulary's padding, and gathering them gives tensors of its shape back.
    """
    config, shape, _ = case(model, tp, pp)
    seen, padding = {}, 0
    for placed in placed_rules(shape, pp):
        tensors = [torch.empty(size, device="meta") for size in placed.hf.values()]
        shards = placed.rule.transform.to_shards(tensors, shape, tp)
        assert len(shards) == tp and len({shard.shape for shard in shards}) == 1
        whole = sum(tensor.numel() for tensor in tensors)
        if placed.rule.transform.shard_dim is not None:
            padding += sum(shard.numel() for shard in shards) - whole
        gathered = shards[0] if placed.rule.transform.shard_dim is None else torch.cat(shards)
        back = placed.rule.transform.from_gathered(gathered, shape, tp)
        assert [tuple(tensor.shape) for tensor in back] == list(placed.hf.values())
        assert not seen.keys() & placed.hf.keys()
        seen |= placed.hf
    assert seen == checkpoint_tensors(ModelNumbers.from_config(config))
    missing = shape.padded_vocab_size(tp) - shape.vocab_size
    assert padding == missing * shape.hidden_size * (1 if shape.tied_embeddings else 2)


@pytest.mark.parametrize(("model", "tp", "pp"), CASES)
def test_sync_plan_takes_every_element_from_one_rank(model, tp, pp):
    """The weight-sync plan of 4 engine ranks: every element of every tensor comes from exactly one
    tensor rank of one stage (norms: from all of them whole), buckets send each tensor once, and
    each rank sends what it holds: its slices and the vocabulary's padding are the parameters that
    ``sizing`` counts for it.
    """
    config, shape, layout = case(model, tp, pp)
    plan = plan_sync(
        checkpoint_tensors(ModelNumbers.from_config(config)),
        "bfloat16",
        config,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        engine_tensor_parallel=4,
        bucket_bytes=512 << 20,
    )
    assert [name for bucket in plan.buckets for name in bucket] == [
        tensor.name for tensor in plan.tensors
    ]
    held = [[0] * tp for _ in range(pp)]
    for tensor in plan.tensors:
        (source,) = tensor.sources
        assert once(source.slices, tensor.shape), tensor.name
        for rank, part in enumerate(source.slices):
            held[source.pp_rank][rank] += 0 if part is None else part.height * part.width
    counted = [stage.num_elements for stage in stage_parameters(shape, layout)]
    padding = (shape.padded_vocab_size(tp) - shape.vocab_size) * shape.hidden_size
    for stage, ranks in enumerate(held):
        vocabularies = (stage == 0) + (stage == pp - 1)
        assert sum(ranks) + vocabularies * padding == counted[stage] * tp


@pytest.mark.slow
def test_a_stage_with_experts_is_built_as_the_table_says():
    """Qwen3-30B-A3B at TP4 x PP2 x EP4: the module of the first and the last rank has the names and
    shapes of the table, 32 of the 128 experts of its 24 layers among them. The others run the same
    code.
    """
    _, shape, layout = case(MIXTURE, 4, 2, ep=4)
    expected = stage_parameters(shape, layout)
    for rank in (0, 7):
        (_, stage), built = meta_ranks.built_parameters(shape, layout, rank)
        assert built == expected[stage].all
        assert sum("local_experts" in name for name in built) == 24 * 32 * 2


@pytest.mark.parametrize(("tp", "pp", "dp", "ep"), EXPERT_CASES)
def test_sync_plan_takes_every_expert_from_one_rank(tp, pp, dp, ep):
    """Qwen3-30B-A3B: every element of the 18,867 tensors comes from one rank of one stage (the
    router and norms: from all of them whole; an expert: whole from one expert-parallel rank),
    buckets send each tensor once, and a rank sends what it holds: its slices, its experts and the
    vocabulary's padding are what ``sizing`` counts for it.
    """
    config, shape, layout = case(MIXTURE, tp, pp, dp, ep)
    plan = plan_sync(
        checkpoint_tensors(ModelNumbers.from_config(config)),
        "bfloat16",
        config,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        engine_tensor_parallel=4,
        bucket_bytes=512 << 20,
        expert_parallel=ep,
    )
    assert [name for bucket in plan.buckets for name in bucket] == [
        tensor.name for tensor in plan.tensors
    ]
    assert len(plan.tensors) == 18867 and len(plan.buckets) < 120
    dense, experts = [[0] * tp for _ in range(pp)], [[0] * ep for _ in range(pp)]
    for tensor in plan.tensors:
        (source,) = tensor.sources
        assert once(source.slices, tensor.shape), tensor.name
        for rank, part in enumerate(source.slices):
            holders, holder = (dense, rank) if source.ep_rank is None else (experts, source.ep_rank)
            holders[source.pp_rank][holder] += 0 if part is None else part.height * part.width
    padding = (shape.padded_vocab_size(tp) - shape.vocab_size) * shape.hidden_size
    for stage, counted in enumerate(stage_parameters(shape, layout)):
        assert sum(dense[stage]) + padding == tp * sum(
            math.prod(size) for size in counted.dense.values()
        )
        assert set(experts[stage]) == {sum(math.prod(size) for size in counted.experts.values())}


def once(slices, shape):
    """Is every element in one of the slices, or the whole tensor in each?"""
    held = [part for part in slices if part is not None]
    columns = (0, shape[1]) if len(shape) == 2 else None
    if all((part.rows, part.columns) == ((0, shape[0]), columns) for part in held):
        return len(held) == len(slices)
    if all(part.columns == columns for part in held):
        return fills([part.rows for part in held], shape[0])
    return all(part.rows == (0, shape[0]) for part in held) and fills(
        [part.columns for part in held], shape[1]
    )


def fills(ranges, length):
    """Do these [start, stop) ranges lie end to end from 0 to ``length``?"""
    ordered = sorted(ranges)
    return (
        ordered[0][0] == 0
        and ordered[-1][1] == length
        and all(a[1] == b[0] for a, b in pairwise(ordered))
    )


@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 4, 4), (2, 2, 4), (2, 1, 2), (2, 2, 1)])
def test_experts_are_built_as_the_table_says(tp, dp, ep):
    """A mixture of 8 experts over expert-parallel ranks: the first and the last rank of each stage
    have the names and shapes that the table has for them. Widths are small; what an expert-parallel
    rank allocates is not measured.
    """
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 67,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    }
    shape = ModelShape.from_hf(config)
    layout = MegatronConfig(
        tensor_parallel=tp,
        pipeline_parallel=2,
        data_parallel=dp,
        expert_parallel=ep,
        sequence_parallel=tp > 1,
    )
    expected = stage_parameters(shape, layout)
    for rank in (0, tp * dp - 1, tp * dp, 2 * tp * dp - 1):
        (_, stage), built = meta_ranks.built_parameters(shape, layout, rank)
        assert built == expected[stage].all
