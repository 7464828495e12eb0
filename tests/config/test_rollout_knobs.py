"""Settings of rl.rollout: contradictions are errors."""

from __future__ import annotations

import pytest

from spark_nemo.config import ConfigError
from spark_nemo.config.rollout import DynamicSampling, RolloutConfig
from spark_nemo.run.compose import compose_config

DYNAMIC = "rl/rollout/filter=dynamic"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([DYNAMIC, "rl.rollout.filter.over_sampling_ratio=0.5"], "at least 1"),
        (["rl.rollout.filter.max_rounds=2"], f"exists with {DYNAMIC}"),
        ([DYNAMIC, "rl.rollout.filter.max_rounds=0"], "at least 1"),
        ([DYNAMIC, "rl/estimator=reinforce_pp"], "remove one of the two"),
        (["rl.rollout.one_step_off=true", "rl.loss.tis_clip=null"], "set rl.loss.tis_clip"),
        (["rl.rollout.one_step_off=true", "rl.steps=1"], "rl.steps=1"),
    ],
)
def test_a_rollout_setting_that_does_not_fit_is_an_error(
    overrides: list[str], message: str
) -> None:
    """The message names the field; nothing is silently ignored."""
    with pytest.raises(ConfigError, match=message):
        compose_config(overrides)


def test_missing_prompts_are_over_sampled() -> None:
    """The number to start is rounded up."""
    assert DynamicSampling(over_sampling_ratio=1.5).started(3) == 5


def test_dynamic_sampling_and_one_step_off_are_chosen_together() -> None:
    """Both are off unless they are chosen."""
    on = compose_config(
        [
            DYNAMIC,
            "rl.rollout.filter.over_sampling_ratio=2",
            "rl.rollout.filter.max_rounds=3",
            "rl.rollout.one_step_off=true",
        ]
    )
    filter = DynamicSampling(over_sampling_ratio=2.0, max_rounds=3)
    assert on.rl.rollout == RolloutConfig(one_step_off=True, filter=filter)
    assert compose_config([]).rl.rollout == RolloutConfig()
