"""Optimizer state moved between layouts, bit for bit. Four gloo processes, bfloat16 weights; one
launch serves all.

That training goes on equally after such a move is test_four_ranks.py's; nothing here is about NCCL
or fused optimizers.
"""

import json

import family_cases
import optimizer_cases as cases
import pytest
from megatron_ranks import run_ranks


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Results of four ranks on a model with tied embeddings and an odd vocabulary."""
    store = tmp_path_factory.mktemp("optimizer")
    family_cases.write_reference("qwen3", store / "hf")
    run_ranks(cases.four_ranks, 4, str(store / "hf" / "bf16"), str(store), timeout=300)
    return json.loads((store / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kind", ["distributed", "plain"])
def test_state_survives_another_layout_bit_for_bit(launch, kind, layout):
    """Weights, float32 weights and both moments of every parameter, saved under TP2 x DP2: loaded
    and saved again under another layout they are the same bits, and so are all of them after the
    way back. Only rows that pad the vocabulary for two tensor ranks are absent where there is one.
    """
    result = launch[kind][layout]
    assert result["states"] > 10 and result["back"] == {}
    assert set(result["there"].values()) <= ({"shape"} if layout.startswith("tp1") else set())
    assert all(name.endswith("word_embeddings.weight") for name in result["there"])


@pytest.mark.slow
def test_padding_between_buckets_is_among_the_layouts(launch):
    """The last stage of TP1 x PP2 x DP2 keeps the tied output layer in a padded bucket before the
    others. Megatron-core 0.16.1 saves the state behind it shifted (``optimizer.padding_counted`` is
    the cure), so that the test above needs a layout that has one.
    """
    assert launch["distributed"]["tp1_pp2"]["padded"]


@pytest.mark.slow
def test_only_the_rank_that_writes_the_state_gathers_it(launch):
    """The first of the two data-parallel ranks of each tensor rank holds the distributed
    optimizer's gathered state while it is saved. Megatron's default gives all of it to every rank,
    over the GPU, which a 7B model on one tensor rank does not survive; what the first rank then
    needs in CPU memory is not measured here.
    """
    assert launch["distributed"]["holders"] == [0, 0]
