"""Models of up to 72 billion parameters on the meta device, dense and with experts.

No weight is allocated, and only this process runs. Proves names, shapes, counts and coverage for the
layouts that the recipes use. A wrong order of rows inside a tensor would not show here, but in
test_families.py and test_four_ranks.py, on small models.
"""

import json
import math
from pathlib import Path

import meta_ranks
import pytest
import torch

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.param_shards import from_gathered, to_shards
from spark_nemo.megatron.sizing.parameters import stage_parameters
from spark_nemo.models.param_mapping import hf_tensor_shapes, map_params
from spark_nemo.models.spec import ModelSpec

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
    return ModelSpec.from_hf(config), layout


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tp", "pp"), CASES)
def test_every_stage_is_built_as_mapped(model, tp, pp):
    """The module that Megatron builds has the names and shapes of the mapping, so
    every parameter is loaded and none has two rules, and ``sizing`` counts it exactly. Built for
    every stage on its first tensor rank, and on the last stage's last one; the ranks between run
    the same code with the same sizes.
    """
    spec, layout = case(model, tp, pp)
    expected = stage_parameters(spec, layout)
    for rank in [*range(0, tp * pp, tp), tp * pp - 1]:
        (tp_rank, stage), built = meta_ranks.built_parameters(spec, layout, rank)
        assert (tp_rank, stage) == (rank % tp, rank // tp)
        assert built == expected[stage].all
        assert expected[stage].num_elements == sum(math.prod(size) for size in built.values())


@pytest.mark.parametrize(("model", "tp", "pp"), CASES)
def test_mapping_covers_every_tensor_once(model, tp, pp):
    """Each Hugging Face tensor is in one parameter, its shards have its elements and no more than
    the vocabulary's padding, and gathering them gives tensors of its shape back.
    """
    spec, _ = case(model, tp, pp)
    seen, padding = {}, 0
    for param in map_params(spec, pp):
        tensors = [torch.empty(size, device="meta") for size in param.hf_shapes.values()]
        shards = to_shards(param.split, tensors, spec, tp)
        assert [tuple(shard.shape) for shard in shards] == [param.shard_shape(spec, tp)] * tp
        if param.split.shard_dim is not None:
            padding += sum(shard.numel() for shard in shards) - param.num_elements
        gathered = shards[0] if param.split.shard_dim is None else torch.cat(shards)
        back = from_gathered(param.split, gathered, spec, tp)
        assert [tuple(tensor.shape) for tensor in back] == list(param.hf_shapes.values())
        assert not seen.keys() & param.hf_shapes.keys()
        seen |= param.hf_shapes
    assert seen == hf_tensor_shapes(spec)
    missing = spec.padded_vocab_size(tp) - spec.vocab_size
    assert padding == missing * spec.hidden_size * (1 if spec.tied_embeddings else 2)


@pytest.mark.slow
def test_a_stage_with_experts_is_built_as_mapped():
    """Qwen3-30B-A3B at TP4 x PP2 x EP4: the module of the first and the last rank has the names and
    shapes of the mapping, 32 of the 128 experts of its 24 layers among them. The others run the same
    code.
    """
    spec, layout = case(MIXTURE, 4, 2, ep=4)
    expected = stage_parameters(spec, layout)
    for rank in (0, 7):
        (_, stage), built = meta_ranks.built_parameters(spec, layout, rank)
        assert built == expected[stage].all
        assert sum("local_experts" in name for name in built) == 24 * 32 * 2


@pytest.mark.parametrize(("tp", "pp", "dp", "ep"), EXPERT_CASES)
def test_every_expert_is_on_one_expert_parallel_rank(tp, pp, dp, ep):
    """Qwen3-30B-A3B: consecutive experts of every layer share a rank, and every rank holds as many
    elements of experts as ``sizing`` counts for it.
    """
    spec, layout = case(MIXTURE, tp, pp, dp, ep)
    assert len(hf_tensor_shapes(spec)) == 18867
    held = [[0] * ep for _ in range(pp)]
    for param in map_params(spec, pp, ep):
        if param.expert is None:
            assert param.expert_rank is None
            continue
        assert param.expert_rank == param.expert * ep // spec.experts.count
        held[param.stage][param.expert_rank] += param.num_elements
    for stage, counted in enumerate(stage_parameters(spec, layout)):
        assert set(held[stage]) == {sum(math.prod(size) for size in counted.experts.values())}


@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 4, 4), (2, 2, 4), (2, 1, 2), (2, 2, 1)])
def test_experts_are_built_as_mapped(tp, dp, ep):
    """A mixture of 8 experts over expert-parallel ranks: the first and the last rank of each stage
    have the names and shapes of the mapping. Widths are small; what an expert-parallel
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
    spec = ModelSpec.from_hf(config)
    layout = MegatronConfig(
        tensor_parallel=tp,
        pipeline_parallel=2,
        data_parallel=dp,
        expert_parallel=ep,
        sequence_parallel=tp > 1,
    )
    expected = stage_parameters(spec, layout)
    for rank in (0, tp * dp - 1, tp * dp, 2 * tp * dp - 1):
        (_, stage), built = meta_ranks.built_parameters(spec, layout, rank)
        assert built == expected[stage].all
