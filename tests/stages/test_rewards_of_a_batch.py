"""From sampled bytes to rewards for every ``rl.reward``, with scripted policy and reward model."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from spark_nemo.config import FailurePolicy, RLConfig
from spark_nemo.config.designs import MODEL_REWARDS
from spark_nemo.engines.base import FinishReason, Generation
from spark_nemo.engines.served import Completion
from spark_nemo.grammar import StepFormat, Variant, prompt_set, split_response
from spark_nemo.records import Problem
from spark_nemo.rewards.judge import RewardJudge
from spark_nemo.rewards.prm_service import PRMService, ServiceLimits
from spark_nemo.stages.credit import batch_advantages
from spark_nemo.stages.rollouts import RolloutSession

PROMPTS = prompt_set("compact")


def response(answer: str, steps: int = 2) -> str:
    body = "".join(f"<step>line {k}</step>" for k in range(steps))
    return rf"<think>{body}</think><answer>\boxed{{{answer}}}</answer>"


def verification(labels: tuple[bool, ...], verdict: str) -> str:
    said = "".join(f"## Step {k}: t\n**This step is {'correct' if c else 'incorrect'}.**\n\n"
                   for k, c in enumerate(labels, start=1))
    return f"{said}**Verification: Is the answer correct (Yes/No)? {verdict}**"


POLICY = [response("7"), response("7"), response("8"), "no format at all"]
JUDGE = [verification((True, True), "Yes"), verification((True, False), "Yes"), verification((True,), "Yes")]
"""In the order in which the responses are shown; the last judges one step of two."""


class Scripted:
    """A served model whose tokens are bytes and whose replies are given; keeps the messages it was sent.

    A prompt's "ids" are its messages. The weights are version 0.
    """

    identity = "scripted"
    tokenizer = SimpleNamespace(
        token_bytes=lambda ids: [bytes([i]) for i in ids], eos_ids=frozenset(), encode_chat=lambda messages: messages)

    def __init__(self, replies: list[str]) -> None:
        self.replies, self.messages, self.engine = replies, [], self

    async def health(self):
        return SimpleNamespace(alive=True, weight_version=0)

    async def complete(self, messages, sampling, seed):
        text = self.replies[len(self.messages) % len(self.replies)]
        self.messages.append(messages)
        ids = tuple(text.encode())
        generation = Generation(ids, (-1.0,) * len(ids), (0,) * len(ids), FinishReason.STOP)
        return Completion((1,), generation, text)

    complete_prompt = complete


def scored(reward: str, advantage: str = "outcome"):
    """One group of four: fine, one step wrong, a verification of another step count, and no format."""
    config = RLConfig(reward=reward, advantage=advantage, group_size=4,
                      failures=FailurePolicy(max_rate=0.5, retries=0))
    model = Scripted(JUDGE)
    # Without a cache, for the script answers the same greedy request differently.
    service = PRMService(model, PROMPTS, config.verifier_sampling, ServiceLimits(cache_entries=0))
    judge = RewardJudge(service, 0) if config.asks_reward_model else None
    session = RolloutSession(Scripted(POLICY), PROMPTS, config, 0, judge, lambda problem_id, text: "8" in text)
    return asyncio.run(session.batch([Problem("p", "3 + 4?")], 0)), model, config


@pytest.mark.parametrize(("reward", "expected"), [
    ("process_aware", [1.0, 1.0, None, 0.0]), ("step_average", [1.0, 0.5, None, 0.0]),
    ("step_augmented", [1.0, 0.8, None, 0.0]), ("rlvr", [0.0, 0.0, 1.0, 0.0]), ("majority", [1.0, 1.0, 0.0, 0.0])])
def test_each_reward_scores_the_same_batch_by_its_own_rule(reward: str, expected: list[float | None]) -> None:
    """A step count that does not match is masked and counted, neither a silent 0 nor labels that are cut to fit."""
    batch, _, _ = scored(reward)
    got = [r if ok else None for r, ok in zip(batch.rewards.rewards, batch.rewards.valid)]
    assert got == pytest.approx(expected)
    assert batch.metrics["failure_rate"] == pytest.approx(1 / 3 if None in expected else 0.0)


def test_random_is_gated_and_the_same_on_a_second_run() -> None:
    """Coins come from the run's seed and the place in the batch, so a resumed run draws the same."""
    first, second = scored("random")[0], scored("random")[0]
    assert first.rewards == second.rewards and first.rewards.rewards[3] == 0.0


@pytest.mark.parametrize("reward", sorted(MODEL_REWARDS))
def test_every_reward_from_the_model_sends_the_step_wise_prompt(reward: str) -> None:
    """The published code sends the ORM's prompt to the PRM-CoT for some of its rewards. What broke the format is not
    sent at all."""
    _, model, _ = scored(reward)
    canonical = [split_response(text, StepFormat.TAGGED).canonical() for text in POLICY[:3]]
    assert model.messages == [PROMPTS.reward(Variant.PRM_COT, "3 + 4?", text) for text in canonical]


def test_sampled_step_spans_meet_the_labels_they_belong_to() -> None:
    """The half that is judged wrong is, in bytes, the second step and nothing else: spans travel from the sampled
    tokens to the advantage."""
    batch, _, config = scored("process_aware", "capo")
    row = batch_advantages(batch, config)[1]
    punished = bytes(i for i, a in zip(batch.rollouts[1].response_ids, row.tolist()) if a < row.max())
    assert punished.decode() == "<step>line 1</step>"
