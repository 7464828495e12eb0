"""Judge with an engine that fails or is down."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from spark_nemo.config import SamplingConfig
from spark_nemo.engines.base import EngineFailure, EngineLost
from spark_nemo.grammar import StepFormat, prompt_set, split_response
from spark_nemo.records import EngineError, Problem, Rollout
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService

TEXT = r"<think><step>3 + 4 = 7</step></think><answer>\boxed{7}</answer>"
ROLLOUT = Rollout(
    group=0,
    problem=Problem("p", "3 + 4?"),
    prompt_ids=(1,),
    response_ids=(2,),
    logprobs=(0.0,),
    weight_versions=(0,),
    text=TEXT,
    finish_reason="stop",
    parsed=split_response(TEXT, StepFormat.TAGGED),
)


def judge_over(error: Exception) -> RewardJudge:
    async def complete_prompt(prompt_ids, sampling, seed):
        raise error

    served = SimpleNamespace(
        complete_prompt=complete_prompt,
        fingerprint="none",
        tokenizer=SimpleNamespace(encode_chat=lambda messages: (1,)),
    )
    return RewardJudge(PRMService(served, prompt_set("compact"), SamplingConfig()), retries=1)


def test_a_request_that_failed_is_a_failed_verification_and_a_lost_pool_is_the_end() -> None:
    """A failed request counts under the failure policy. A lost pool would fail every verification
    of every batch, so it stops the run with its own error.
    """
    assert asyncio.run(judge_over(EngineFailure("too long")).judge(ROLLOUT)).outcome == EngineError(
        "too long"
    )
    with pytest.raises(EngineLost, match="no server"):
        asyncio.run(judge_over(EngineLost("no server of the verifier pool is left")).judge(ROLLOUT))
