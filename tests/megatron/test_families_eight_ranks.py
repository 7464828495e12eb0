"""Eight gloo processes, every family: TP up to 4 x PP 2, experts spread over ranks. Three launches
serve all tests.

Proves nothing about NCCL, Transformer Engine or several machines. One process: test_families.py.
"""

import json
import sys
from pathlib import Path

import conversion_cases
import family_cases as cases
import pytest
from megatron_ranks import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "weight_sync"))
from receivers import start_receivers


def eight_ranks(function, store, results, *more):
    """Run ``function`` on eight ranks with a reference folder of every family; return the content
    of the file ``results``.
    """
    folders = {family: str(store / family) for family in cases.FAMILIES}
    for family, folder in folders.items():
        cases.write_reference(family, folder)
    run_ranks(function, 8, folders, str(store), *more, timeout=500)
    return json.loads((store / results).read_text())


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Results of eight ranks for every family."""
    return eight_ranks(cases.family_ranks, tmp_path_factory.mktemp("families"), "families.json")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Results of eight ranks for experts, with a server that takes weights."""
    with start_receivers(1) as (server,):
        return eight_ranks(
            cases.expert_ranks, tmp_path_factory.mktemp("experts"), "experts.json", server.url
        )


@pytest.fixture(scope="module")
def conversion(tmp_path_factory):
    """Results of eight ranks for converted folders and megatron-core."""
    return eight_ranks(
        conversion_cases.eight_ranks, tmp_path_factory.mktemp("conversion"), "conversion.json"
    )


def same_as_transformers(result):
    assert result["logprobs"] <= 1e-4 and result["uneven"] <= 1e-4, result
    assert all(result[name] <= 1e-5 for name in ("loss", "grads", "grad_norm")), result


@pytest.mark.slow
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_layout_equals_transformers(launch, family, layout):
    """Log-probabilities, loss, all gradients and their norm equal transformers', also with four
    tensor ranks for two key-value heads, where ranks share a head. float32; the rest of the eight
    ranks is data parallel, and has uneven numbers of micro-batches, one rank none.
    """
    same_as_transformers(launch[f"{family}_{layout}"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_round_trip_is_bit_exact(launch, family, layout):
    """Tensors loaded from a folder and exported again are equal in float32, and bit for bit in
    bfloat16, on every rank.
    """
    result = launch[f"{family}_{layout}"]
    assert result["export"] == 0
    assert result["bfloat16"][0] == 0 and result["bfloat16"][1] > 20


@pytest.mark.slow
@pytest.mark.parametrize("layout", cases.EXPERT_LAYOUTS)
def test_experts_on_several_ranks(experts, layout):
    """Experts spread over data-parallel ranks, over tensor ranks, and over both with two stages:
    the same numbers as transformers, and the same export. Tokens travel by all-to-all over gloo;
    grouped GEMM is a GPU's.
    """
    result = experts[f"qwen3_moe_{layout}"]
    same_as_transformers(result)
    assert result["export"] == 0 and result["bfloat16"][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["disk", "distributed"])
@pytest.mark.parametrize("layout", cases.EXPERT_LAYOUTS)
def test_trained_experts_reach_a_server(experts, layout, transport):
    """Trained experts from two and four expert-parallel ranks, over data ranks, over tensor ranks,
    and over both with two stages: after a push every parameter of the test server, which stacks
    experts as SGLang does, has the trainer's checksum. No rank allocates more than the plan says
    during the export.
    """
    result = experts[f"push_{layout}"][transport]
    assert result["after"] == []
    assert transport == "disk" or result["before"] > 15
    assert result["buckets"] > 20 and 0 < result["memory"][0] <= result["memory"][1]
    held, planned = result["gathered"]
    assert planned / 2 <= held <= planned


@pytest.mark.slow
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_megatron_core_reads_and_writes_what_is_converted(conversion, family):
    """The conversion of a folder, loaded by megatron-core's own loader (no key may be absent), is
    the folder's bits under TP x PP of 1x1, 2x1, 1x2, 2x2 and 4x2; what its saver writes there
    converts back to the same bits.
    """
    assert conversion[family] == dict.fromkeys(("1x1", "2x1", "1x2", "2x2", "4x2"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_full", "qwen3_moe_full", "qwen3_moe_selective"])
def test_sequence_parallel_with_recomputation(launch, case):
    """Norms of queries and keys, shared key-value heads and experts at TP4 x PP2 with sequence
    parallelism and full recomputation, and experts alone recomputed at TP2 x PP2 x EP2: the same
    numbers as transformers.
    """
    same_as_transformers(launch[case])


@pytest.mark.slow
def test_experts_resume_under_another_layout(experts):
    """Experts' weights and optimizer state, saved at TP2 x EP2 by the distributed optimizer: the
    next two steps are the same bit for bit there, and to 1e-5 at PP2 x EP4.
    """
    (same, other), expected = experts["resume"]["resumed"], experts["resume"]["expected"]
    assert same == expected
    assert all(
        step == pytest.approx(want, abs=1e-5) for step, want in zip(other, expected, strict=True)
    )
