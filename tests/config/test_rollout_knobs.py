"""Settings of rl.rollout that cannot do what they say are refused."""

from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError, RLConfig
from spark_nemo.config.compose import compose_config
from spark_nemo.config.rollout import RolloutConfig


@pytest.mark.parametrize(
    ("knobs", "rl", "message"),
    [
        ({"oversample": 0.5}, {}, "at least 1"),
        ({"max_rounds": 2}, {}, "no effect without rl.rollout.oversample"),
        ({"oversample": 2.0, "max_rounds": 0}, {}, "at least 1"),
        ({"oversample": 2.0}, {"estimator": "reinforce_pp"}, "remove one of the two"),
        ({"one_step_off": True}, {"importance_cap": None}, "set rl.importance_cap"),
        ({"one_step_off": True}, {"steps": 1}, "no effect with rl.steps=1"),
    ],
)
def test_a_rollout_knob_that_does_not_fit_is_an_error(knobs: dict, rl: dict, message: str) -> None:
    """The message names the field; nothing is silently ignored."""
    with pytest.raises(ConfigError, match=message):
        RLConfig(rollout=RolloutConfig(**knobs), **rl)


def test_rounds_and_starts_are_resolved() -> None:
    """Missing prompts times oversample, rounded up; four rounds where nothing is said."""
    assert RolloutConfig(oversample=1.5).started(3) == 5
    assert RolloutConfig(oversample=1.5).rounds == 4


def test_the_knobs_are_set_from_the_command_line() -> None:
    """And are off unless they are."""
    on = compose_config(
        ["rl.rollout.oversample=2", "rl.rollout.max_rounds=3", "rl.rollout.one_step_off=true"]
    )
    assert on.rl.rollout == RolloutConfig(one_step_off=True, oversample=2.0, max_rounds=3)
    assert compose_config([]).rl.rollout == RolloutConfig()
