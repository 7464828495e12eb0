"""Four gloo processes: the same numbers under every layout. One launch serves all tests, since a
launch costs 20 s.

Proves nothing about NCCL or several machines.
"""

import json

import megatron_cases as cases
import pytest
from megatron_ranks import run_ranks
from safetensors.torch import load_file

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.worker import MegatronWorker

LAYOUTS = (
    "tp2_pp2_tied",
    "tp2_pp2_untied",
    "tp2_tied",
    "tp2_untied",
    "pp2_tied",
    "pp2_untied",
    "tp2_dp2_sp",
    "pp2_dp2_distributed_optimizer",
    "tp2_pp2_sp_full_recompute",
    "pp4_selective_recompute",
    "tp4",
    "dp4_one_rank_idle",
)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Folder with what four ranks found out, and the results themselves."""
    tied, untied, store = (tmp_path_factory.mktemp(name) for name in ("tied", "untied", "store"))
    cases.write_reference(tied, tied=True)
    cases.write_reference(untied, tied=False)
    run_ranks(cases.four_ranks, 4, str(tied), str(untied), str(store))
    return store, json.loads((store / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_transformers(launch, layout):
    """Log-probabilities, loss, all gradients and 5 AdamW steps equal transformers under tensor,
    pipeline, data and sequence parallelism, with recomputation, with 1 to 10 sequences per
    micro-batch, uneven over the ranks or absent on one, and a vocabulary of 67 that no layout
    divides. float32.
    """
    result = launch[1][layout]
    assert result["logprobs"] <= 1e-4 and result["export"] == 0, result
    names = [
        name
        for name in ("loss", "metrics", "num_tokens", "grads", "grad_norm", "adam")
        if name in result
    ]
    assert all(result[name] <= 1e-5 for name in names), result


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", ["resume_False", "resume_True"], ids=["plain", "distributed_optimizer"]
)
def test_checkpoints_move_between_layouts(launch, optimizer):
    """A checkpoint of TP2 x DP2 resumes bit for bit there, and to 1e-5 under DP4, PP2 x DP2 and TP2
    x PP2.
    """
    results = launch[1][optimizer]
    (same, *others), expected = results["resumed"], results["expected"]
    assert same == expected
    assert all(
        step == pytest.approx(want, abs=1e-5)
        for other in others
        for step, want in zip(other, expected)
    )


@pytest.mark.slow
def test_new_model_does_not_depend_on_the_layout(launch):
    """Random initialisation under TP2 x PP2 gives the model that one process gives, bit for bit."""
    folder = launch[0] / "random_tp2_pp2"
    layout = MegatronConfig(dtype="float32", distributed_optimizer=False)
    alone = MegatronWorker.from_config(
        json.loads((folder / "config.json").read_text()), layout, seed=3
    )
    assert cases.max_difference(alone.export_hf(), load_file(folder / "model.safetensors")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["push_tied", "push_untied"])
def test_trained_weights_reach_the_engine_of_rank_0(launch, case):
    """TP2 x PP2 with tied and TP2 x DP2 with untied embeddings, a vocabulary that is padded: after
    a push every tensor of the embedded engine has the trainer's checksum. A failing engine and a
    failing gate are errors on all four ranks, also when one rank alone has seen the difference; no
    rank waits indefinitely. A fleet that is lost in a push and returns gets it again from all four
    ranks, which hear of the wait meanwhile; one that is lost every time is an error on all. During
    the export no rank allocates more than the plan says, every storage counted.
    """
    result = launch[1][case]
    assert result["differing_before"] > 20 and result["differing_after"] == []
    assert 0 < result["memory"][0] <= result["memory"][1]
    per_rank, planned = result["gathered"]
    assert planned / 2 <= max(per_rank) <= planned, (per_rank, planned)
    assert result["returned"] == [None] * 4 and result["version"] == 2
    assert result["gone_again"] == ["weights version 3: connection refused"] * 4
    assert result["refused"] == ["weights version 2: out of memory"] * 4
    assert len(set(result["gate"])) == 1 and "0.5 nats on average" in result["gate"][0]
