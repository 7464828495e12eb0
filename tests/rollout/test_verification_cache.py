"""The verification cache under the real policy, reward model and engine of the toy task."""

from __future__ import annotations

import asyncio
import math

import pytest

from spark_nemo.config import EngineConfig, RLConfig, SamplingConfig
from spark_nemo.config.reward import ModelReward
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import prompt_set
from spark_nemo.records import Problem
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService, ServiceCounts, ServiceLimits
from spark_nemo.rollout.batch import RolloutBatch
from spark_nemo.rollout.generator import RolloutGenerator
from spark_nemo.toy.problem_files import split_problems
from spark_nemo.toy.resolve import ASSETS

PROMPTS, ENGINE = prompt_set("compact"), EngineConfig(max_batch_size=64, max_context=320)
PROBLEMS = [
    Problem(f"p{k}", problem.question) for k, problem in enumerate(split_problems("rl", 3, 0))
]


def two_steps(
    votes: int, temperature: float, entries: int
) -> tuple[list[RolloutBatch], list[ServiceCounts]]:
    """Two batches of one policy. The second has the first's problems, as a second epoch would."""
    rl = RLConfig(
        group_size=6,
        reward=ModelReward(
            votes=votes, sampling=SamplingConfig(temperature=temperature, max_new_tokens=120)
        ),
        sampling=SamplingConfig(temperature=0.7, max_new_tokens=120),
    )

    async def run():
        policy, model = (
            ServedModel.load(ENGINE, ASSETS / name, role)
            for name, role in (("generator", "policy"), ("verifier", "verifier"))
        )
        service = PRMService(
            model, PROMPTS, rl.reward.sampling, ServiceLimits(cache_entries=entries)
        )
        judge = RewardJudge(service, 1, votes, rl.reward.votes_needed)
        generator = RolloutGenerator(policy, PROMPTS, rl, 0, judge, None)
        batches, counts = [], []
        for step in range(2):
            batches.append(await generator.generate_batch(PROBLEMS, step))
            counts.append(service.take_counts())
        await policy.engine.close()
        await model.engine.close()
        return batches, counts

    return asyncio.run(run())


@pytest.mark.parametrize(("votes", "temperature"), [(1, 0.0), (3, 0.7)])
def test_the_cache_spares_verifications_and_changes_no_reward(
    votes: int, temperature: float
) -> None:
    """Rewards, outcomes and metrics of two steps are equal with and without it, and fewer tokens
    are sampled. Says nothing about engines that ignore seeds.
    """
    cached, with_cache = two_steps(votes, temperature, 1000)
    plain, without = two_steps(votes, temperature, 0)
    for a, b in zip(cached, plain):
        assert a.metrics == b.metrics
        for mine, other in zip(a.rollouts, b.rollouts, strict=True):
            assert mine.verdict == other.verdict and mine.valid == other.valid
            assert mine.reward == other.reward or math.isnan(mine.reward + other.reward)
    sampled, needed = (sum(c.sampled_tokens for c in counts) for counts in (with_cache, without))
    print([counts.metrics()["hit_rate"] for counts in with_cache], sampled, needed)
    assert 0 < sampled < needed
    assert sum(counts.remembered + counts.shared for counts in without) == 0
