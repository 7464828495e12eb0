"""Settings of rl: each exists only with the option that reads it; errors name invalid values."""

from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError, SamplingConfig
from spark_nemo.config.reward import ModelReward
from spark_nemo.run.compose import compose_config

SAMPLED = "rl.reward.sampling.temperature=0.8"


@pytest.mark.parametrize(
    ("named", "overrides"),
    [
        ("rl.estimator.std_normalize", ["rl/estimator=rloo", "rl.estimator.std_normalize=true"]),
        ("rl.estimator.std_normalize", ["rl/estimator=dr_grpo", "rl.estimator.std_normalize=true"]),
        ("rl.estimator.std_normalize", ["rl/advantage=capo", "rl.estimator.std_normalize=true"]),
        ("rl/estimator", ["rl/advantage=min_form", "rl/estimator=rloo"]),
        ("rl/estimator", ["rl/advantage=selective", "rl/estimator=none"]),
        ("rl.loss.aggregation", ["rl/estimator=dr_grpo", "rl.loss.aggregation=token_mean"]),
        ("rl/loss=clipped", ["rl.loss.importance_sampling_level=sequence"]),
        ("rl/loss=clipped", ["rl.loss.clip_low=0.1"]),
        ("rl/loss=clipped", ["rl.loss.num_minibatches=2"]),
        ("rl.loss.num_minibatches", ["rl/loss=clipped", "rl.loss.num_minibatches=1"]),
        ("rl/advantage", ["rl/advantage=selective", "rl/reward=rlvr"]),
        ("rl/advantage", ["rl/advantage=prefix", "rl/reward=step_augmented"]),
        ("rl/advantage", ["rl/advantage=sideways"]),
        ("rl/estimator", ["rl/estimator=ppo"]),
        ("rl.reward.model", ["rl/reward=majority", "rl.reward.model=somewhere"]),
        ("rl.reward.model", ["rl/reward=random", "rl.reward.model=somewhere"]),
        ("rl.reward.votes", ["rl/reward=majority", "rl.reward.votes=3"]),
        ("rl.reward.queue", ["rl/reward=random", "rl.reward.queue=1024"]),
        ("rl.reward.cache", ["rl/reward=rlvr", "rl.reward.cache=0"]),
        ("rl.reward.failures", ["rl/reward=majority", "rl.reward.failures.max_rate=0.2"]),
        ("rl/reward/failures", ["rl/reward=random", "rl/reward/failures=penalize"]),
        ("rl.reward.retries", ["rl/reward=rlvr", "rl.reward.retries=1"]),
        ("rl/reward/failures=penalize", ["rl.reward.failures.penalty=0.0"]),
        ("rl.reward.votes", ["rl.reward.votes=3"]),
        ("rl.reward.votes", ["rl.reward.votes=0"]),
        ("rl.reward.min_votes", ["rl.reward.min_votes=2"]),
        ("rl.reward.min_votes", ["rl.reward.votes=3", "rl.reward.min_votes=4", SAMPLED]),
        ("rl.reward.min_votes", ["rl.reward.min_votes=many"]),
        ("rl.reward.queue", ["rl.reward.queue=0"]),
        ("rl.reward.deadline_s", ["rl.reward.deadline_s=0.0"]),
        ("rl.reward.deadline_s", ["rl.reward.deadline_s=nan"]),
        ("rl.reward.cache", ["rl.reward.cache=-1"]),
        ("rl.reward.variant", ["rl/reward=random", "rl.reward.variant=prm"]),
        ("rl.reward.variant", ["rl.reward.variant=cot"]),
        ("rl.reward.variant", ["rl/reward=step_average", "rl.reward.variant=orm"]),
        ("rl.reward.variant", ["rl/advantage=selective", "rl.reward.variant=orm"]),
        ("rl/advantage=selective", ["rl.advantage.min_steps=4"]),
        ("rl.advantage.max_steps", ["rl/advantage=global_step", "rl.advantage.max_steps=20"]),
        (
            "rl.advantage.min_steps",
            ["rl/advantage=selective", "rl.advantage.min_steps=5", "rl.advantage.max_steps=4"],
        ),
        (
            "rl.advantage.max_steps",
            ["rl/advantage=global_step_penalty", "rl.advantage.max_steps=0"],
        ),
        (
            "rl.advantage.min_steps",
            ["rl/advantage=global_step_penalty", "rl.advantage.min_steps=21"],
        ),
        ("rl/shaping=overlong", ["rl.shaping.buffer=20"]),
        ("rl.shaping.buffer", ["rl/shaping=overlong", "rl.shaping.buffer=2049"]),
        ("rl.shaping.buffer", ["rl/shaping=overlong", "rl.shaping.buffer=0"]),
        ("rl/shaping", ["rl/shaping=overlong", "rl/advantage=prefix"]),
        ("rl/kl=k1, k2, k3", ["rl.kl.coef=0.1"]),
        ("rl.kl.coef", ["rl/kl=k3", "rl.kl.coef=0"]),
        ("rl/reward=rlvr", ["rl.reward" + "=rlvr"]),
        ("rl/reward=rlvr", ["rl.reward.name=rlvr"]),
    ],
)
def test_a_setting_without_effect_does_not_exist(named: str, overrides: list[str]) -> None:
    """One line that names the field, or the option with which it exists."""
    with pytest.raises(ConfigError) as error:
        compose_config(overrides)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl/estimator=dr_grpo"],
        ["rl/estimator=rloo", "rl.loss.aggregation=sequence_mean"],
        ["rl/advantage=selective", "rl/estimator=reinforce_pp"],
        ["rl/advantage=capo", "rl.loss.aggregation=length_constant"],
        ["rl/loss=clipped", "rl.loss.importance_sampling_level=sequence", "rl.loss.clip_high=3e-4"],
        ["rl/reward=step_augmented", "rl.estimator.std_normalize=false"],
        ["rl.reward.votes=4", "rl.reward.min_votes=2", SAMPLED],
        ["rl.reward.queue=1", "rl.reward.deadline_s=0.5", "rl.reward.cache=0"],
        ["rl.reward.variant=orm"],
        ["rl/reward=step_augmented", "rl.reward.variant=prm"],
        ["rl/advantage=selective_half", "rl.advantage.min_steps=4", "rl.advantage.max_steps=20"],
        ["rl/advantage=global_step_penalty", "rl.advantage.min_steps=2"],
        ["rl/reward=rlvr", "rl/shaping=overlong", "rl.shaping.buffer=2048"],
        ["rl/reward=rlvr", "rl/reward/failures=penalize", "rl.reward.failures.max_rate=1.0"],
    ],
)
def test_what_has_an_effect_is_accepted(overrides: list[str]) -> None:
    """Valid combinations of the same settings."""
    compose_config(overrides)


def test_dr_grpo_has_its_own_aggregation() -> None:
    """The options for which the aggregation is automatic."""
    resolved = [compose_config([f"rl/estimator={name}"]).rl for name in ("grpo", "dr_grpo")]
    assert [rl.aggregation for rl in resolved] == ["token_mean", "length_constant"]


@pytest.mark.parametrize("reward", ["majority", "random", "step_augmented"])
def test_no_reward_but_rlvr_may_be_given_answer_keys(reward: str) -> None:
    """Majority vote is a baseline without answers and does not accept answer keys."""
    with pytest.raises(ConfigError, match="rl_answers"):
        compose_config(["data.rl_answers=keys.jsonl", f"rl/reward={reward}"])


def test_more_than_half_of_the_votes_must_parse_unless_another_number_is_set() -> None:
    """The default is one vote."""
    sampled = SamplingConfig(temperature=0.8)
    needed = [ModelReward(votes=n, sampling=sampled).votes_needed for n in (1, 2, 3, 4)]
    assert needed == [1, 2, 2, 3]
    assert ModelReward(votes=4, min_votes=1, sampling=sampled).votes_needed == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl.loss.tis_clip=nan"],
        ["rl/kl=k3", "rl.kl.coef=nan"],
        ["rl/loss=clipped", "rl.loss.clip_high=nan"],
        ["rl/reward/failures=penalize", "rl.reward.failures.penalty=nan"],
        ["rl/reward/failures=penalize", "rl.reward.failures.penalty=-inf"],
        ["rl.optimizer.lr=nan"],
        ["rl.hacking.detectors.inflation=nan"],
    ],
)
def test_a_number_that_is_none_is_rejected_at_the_start(overrides: list[str]) -> None:
    """YAML has .nan, and NaN passes every comparison of the form "too small": it would reach the
    weights.
    """
    name = overrides[-1].partition("=")[0].rpartition(".")[2]
    with pytest.raises(ConfigError, match=name):
        compose_config(overrides)
