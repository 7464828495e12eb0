"""A knob of RLConfig that nothing would read is an error at start."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spark_nemo.config import (
    ConfigError,
    DataConfig,
    FailurePolicy,
    OptimizerConfig,
    RLConfig,
    SamplingConfig,
    SparkConfig,
)
from spark_nemo.config.hacking import DetectorsConfig

SAMPLED = SamplingConfig(temperature=0.8)


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("rl.std_normalize", {"estimator": "rloo", "std_normalize": True}),
        ("rl.std_normalize", {"estimator": "dr_grpo", "std_normalize": False}),
        ("rl.std_normalize", {"advantage": "capo", "std_normalize": True}),
        ("rl.estimator", {"advantage": "min_form", "estimator": "rloo"}),
        ("rl.loss_aggregation", {"estimator": "dr_grpo", "loss_aggregation": "token_mean"}),
        ("rl.importance_sampling_level", {"importance_sampling_level": "sequence"}),
        ("rl.clip_low", {"clip_low": 0.1}),
        ("rl.clip_high", {"clip_high": 0.28}),
        ("rl.advantage", {"advantage": "selective", "reward": "rlvr"}),
        ("rl.advantage", {"advantage": "prefix", "reward": "step_augmented"}),
        ("rl.reward_model", {"reward": "majority", "reward_model": "somewhere"}),
        ("rl.reward_model", {"reward": "random", "reward_model": "somewhere"}),
        ("rl.advantage", {"advantage": "sideways"}),
        ("rl.verifier_votes", {"reward": "majority", "verifier_votes": 3}),
        ("rl.verifier_queue", {"reward": "random", "verifier_queue": 1024}),
        ("rl.verifier_cache", {"reward": "rlvr", "verifier_cache": 0}),
        ("rl.failures.max_rate", {"reward": "majority", "failures": FailurePolicy(max_rate=0.2)}),
        ("rl.failures.action", {"reward": "random", "failures": FailurePolicy(action="mask")}),
        ("rl.failures.retries", {"reward": "rlvr", "failures": FailurePolicy(retries=1)}),
        ("rl.verifier_votes", {"verifier_votes": 3}),
        ("rl.verifier_votes", {"verifier_votes": 0}),
        ("rl.verifier_min_votes", {"verifier_min_votes": 1}),
        (
            "rl.verifier_min_votes",
            {"verifier_votes": 3, "verifier_min_votes": 4, "verifier_sampling": SAMPLED},
        ),
        ("rl.verifier_queue", {"verifier_queue": 0}),
        ("rl.verifier_deadline", {"verifier_deadline": 0.0}),
        ("rl.verifier_deadline", {"verifier_deadline": float("nan")}),
        ("rl.verifier_cache", {"verifier_cache": -1}),
        ("rl.estimator", {"estimator": "ppo"}),
        ("rl.reward_variant", {"reward": "random", "reward_variant": "prm"}),
        ("rl.reward_variant", {"reward_variant": "cot"}),
        ("rl.reward_variant", {"reward": "step_average", "reward_variant": "orm"}),
        ("rl.reward_variant", {"advantage": "selective", "reward_variant": "orm"}),
        ("rl.selective_min_steps", {"selective_min_steps": 4}),
        ("rl.selective_max_steps", {"advantage": "global_step_penalty", "selective_max_steps": 20}),
        (
            "rl.selective_",
            {"advantage": "selective", "selective_min_steps": 5, "selective_max_steps": 4},
        ),
        ("rl.step_penalty_min", {"advantage": "global_step", "step_penalty_min": 3}),
        ("rl.step_penalty_max", {"advantage": "global_step_penalty", "step_penalty_max": 0}),
        ("rl.step_penalty_", {"advantage": "global_step_penalty", "step_penalty_min": 21}),
        ("rl.overlong_buffer", {"overlong_buffer": 2049}),
        ("rl.overlong_buffer", {"overlong_buffer": 0}),
        ("rl.overlong_buffer", {"overlong_buffer": 8, "advantage": "prefix"}),
    ],
)
def test_a_knob_without_effect_is_named(named: str, settings: dict[str, object]) -> None:
    """One line that names the field."""
    with pytest.raises(ConfigError) as error:
        RLConfig(**settings)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "dr_grpo"},
        {"estimator": "rloo", "loss_aggregation": "sequence_mean"},
        {"advantage": "selective", "estimator": "reinforce_pp"},
        {"advantage": "capo", "loss_aggregation": "length_constant"},
        {"importance_sampling_level": "sequence", "num_minibatches": 2, "clip_high": 3e-4},
        {"reward": "step_augmented", "std_normalize": False},
        {"verifier_votes": 4, "verifier_min_votes": 2, "verifier_sampling": SAMPLED},
        {"verifier_queue": 1, "verifier_deadline": 0.5, "verifier_cache": 0},
        {"reward_variant": "orm"},
        {"reward": "step_augmented", "reward_variant": "prm"},
        {"advantage": "selective_half", "selective_min_steps": 4, "selective_max_steps": 20},
        {"advantage": "global_step_penalty", "step_penalty_min": 2},
        {"reward": "rlvr", "overlong_buffer": 2048},
        {"reward": "rlvr", "failures": FailurePolicy("penalize", 0.0, max_rate=1.0)},
    ],
)
def test_what_has_an_effect_is_accepted(settings: dict[str, object]) -> None:
    """The other side of the same rule."""
    RLConfig(**settings)


def test_failures_that_are_not_set_are_what_they_always_were() -> None:
    """None is masking after one more attempt, and a bound of a fifth; a 0 that is written is not
    taken for unset.
    """
    unset, zero = FailurePolicy(), FailurePolicy(retries=0, max_rate=0.0)
    assert (unset.masks, unset.num_retries, unset.bound) == (True, 1, 0.2)
    assert (zero.num_retries, zero.bound) == (0, 0.0)


def test_the_resolved_aggregation() -> None:
    """Nothing set is what it always was; Dr.GRPO brings its own."""
    resolved = RLConfig().aggregation, RLConfig(estimator="dr_grpo").aggregation
    assert resolved == ("token_mean", "length_constant")


@pytest.mark.parametrize("reward", ["majority", "random", "step_augmented"])
def test_no_reward_but_rlvr_may_be_given_answer_keys(reward: str) -> None:
    """Majority vote is a baseline without answers, not a way around the wall."""
    with pytest.raises(ConfigError, match="rl_answers"):
        SparkConfig(data=DataConfig(rl_answers="keys.jsonl"), rl=RLConfig(reward=reward))


def test_more_than_half_of_the_votes_must_parse_unless_another_number_is_set() -> None:
    """One vote is what it always was."""
    assert [
        RLConfig(verifier_votes=n, verifier_sampling=SAMPLED).min_votes for n in (1, 2, 3, 4)
    ] == [1, 2, 2, 3]
    assert (
        RLConfig(verifier_votes=4, verifier_min_votes=1, verifier_sampling=SAMPLED).min_votes == 1
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("named", "make"),
    [
        ("rl.tis_clip", lambda: RLConfig(tis_clip=NAN)),
        ("rl.kl_coef", lambda: RLConfig(kl_estimator="k3", kl_coef=NAN)),
        ("rl.clip_high", lambda: RLConfig(num_minibatches=2, clip_high=NAN)),
        ("failures.penalty", lambda: FailurePolicy(action="penalize", penalty=NAN)),
        ("failures.penalty", lambda: FailurePolicy(action="penalize", penalty=float("-inf"))),
        ("optimizer.lr", lambda: OptimizerConfig(lr=NAN)),
        ("rl.hacking.detectors.inflation", lambda: DetectorsConfig(inflation=NAN)),
    ],
)
def test_a_number_that_is_none_is_refused_at_the_start(
    named: str, make: Callable[[], object]
) -> None:
    """YAML has .nan, and NaN passes every comparison that is written as "too small": it would end
    in the weights.
    """
    with pytest.raises(ConfigError, match=named):
        make()
