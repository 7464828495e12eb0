"""top_k and top_p of ``evaluation`` reach the embedded engine and the requests to a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from scripted_engine import Bytes

from spark_nemo.config import ConfigError, EngineConfig, EvaluationConfig, SamplingConfig
from spark_nemo.engines.base import FinishReason, Generation
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.engines.sglang.protocol import sampling_json
from spark_nemo.evaluation.policy_accuracy import sample_policy
from spark_nemo.grammar import prompt_set
from spark_nemo.records import Problem
from spark_nemo.toy.resolve import ASSETS

PROMPTS = prompt_set("compact")


def sample(served: ServedModel, question: str, **settings: object) -> list[str]:
    config = EvaluationConfig(samples_per_problem=3, max_new_tokens=30, **settings)
    rows, _ = asyncio.run(sample_policy(served, [Problem("p", question)], PROMPTS, config))
    return [row.text for row in rows]


def test_top_k_of_one_samples_the_greedy_completion() -> None:
    """top_k=1 and a tiny top_p leave the most probable token alone, at a high temperature.

    Other values of both are compared with a reference in tests/engines.
    """
    served = ServedModel.load(EngineConfig(max_context=128), ASSETS / "generator", "policy")
    *free, greedy = sample(served, "7 + 5 - 3", temperature=3.0)
    assert len({*free, greedy}) > 1
    for cut in ({"top_k": 1}, {"top_p": 1e-6}):
        assert set(sample(served, "7 + 5 - 3", temperature=3.0, **cut)) == {greedy}
    asyncio.run(served.engine.close())


def test_a_server_is_sent_the_cuts_of_samples_alone() -> None:
    """An unset top_k is absent from a request, and the greedy completion is not cut."""
    seen = []

    async def generate(request):
        seen.append(sampling_json(request.sampling))
        return Generation((256,), (0.0,), (0,), FinishReason.STOP)

    served = ServedModel(SimpleNamespace(generate=generate), Bytes(), "m")
    sample(served, "q", temperature=0.6, top_p=0.95, top_k=20)
    assert [(row["top_p"], row.get("top_k")) for row in seen] == [(0.95, 20)] * 3 + [(1.0, None)]
    seen.clear()
    sample(served, "q")
    assert [(row["top_p"], row.get("top_k")) for row in seen] == [(1.0, None)] * 4


def test_unset_cuts_leave_the_keys_of_stored_results_as_they_were() -> None:
    """A setting without top_k has the same fingerprint as before, with it another."""
    before = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 8}
    assert SamplingConfig(**before).fingerprint() == before
    assert SamplingConfig(**before, top_k=20).fingerprint() == {**before, "top_k": 20}


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"top_k": 0}, "top_k")],
)
def test_a_cut_that_leaves_nothing_is_rejected(settings: dict, field: str) -> None:
    """The error names the section."""
    with pytest.raises(ConfigError, match=rf"^evaluation\.{field}="):
        EvaluationConfig(**settings)
    with pytest.raises(ConfigError, match=rf"^sampling\.{field}="):
        SamplingConfig(**settings)
