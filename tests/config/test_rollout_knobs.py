"""Settings of rl.rollout that cannot do what they say are refused."""

from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError, RLConfig
from spark_nemo.config.compose import compose_config
from spark_nemo.config.rollout import RolloutConfig


@pytest.mark.parametrize(
    ("knobs", "rl", "message"),
    [
        ({"over_sampling_ratio": 0.5}, {}, "at least 1"),
        ({"max_rounds": 2}, {}, "no effect without rl.rollout.over_sampling_ratio"),
        ({"over_sampling_ratio": 2.0, "max_rounds": 0}, {}, "at least 1"),
        ({"over_sampling_ratio": 2.0}, {"estimator": "reinforce_pp"}, "remove one of the two"),
        ({"one_step_off": True}, {"tis_clip": None}, "set rl.tis_clip"),
        ({"one_step_off": True}, {"steps": 1}, "no effect with rl.steps=1"),
    ],
)
def test_a_rollout_knob_that_does_not_fit_is_an_error(knobs: dict, rl: dict, message: str) -> None:
    """The message names the field; nothing is silently ignored."""
    with pytest.raises(ConfigError, match=message):
        RLConfig(rollout=RolloutConfig(**knobs), **rl)


def test_rounds_and_starts_are_resolved() -> None:
    """Missing prompts times over_sampling_ratio, rounded up; four rounds where nothing is said."""
    assert RolloutConfig(over_sampling_ratio=1.5).started(3) == 5
    assert RolloutConfig(over_sampling_ratio=1.5).rounds == 4


def test_the_knobs_are_set_from_the_command_line() -> None:
    """And are off unless they are."""
    on = compose_config(
        [
            "rl.rollout.over_sampling_ratio=2",
            "rl.rollout.max_rounds=3",
            "rl.rollout.one_step_off=true",
        ]
    )
    assert on.rl.rollout == RolloutConfig(one_step_off=True, over_sampling_ratio=2.0, max_rounds=3)
    assert compose_config([]).rl.rollout == RolloutConfig()
