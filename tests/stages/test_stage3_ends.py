"""Runs of stage III that do not reach their end, and runs that must not resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from world import SMALL

from spark_nemo.config import SparkConfig
from spark_nemo.config.compose import compose_config
from spark_nemo.megatron import NonFiniteGradient
from spark_nemo.records.jsonl import read_problems
from spark_nemo.rollout.manager import RolloutManager
from spark_nemo.stages import stage3
from spark_nemo.toy.resolve import ASSETS, resolve_toy
from spark_nemo.training.grpo_trainer import GRPOTrainer
from spark_nemo.weight_sync.synchronizer import WeightSync


def tiny(folder: Path, *overrides: str) -> SparkConfig:
    """A run of seconds: a coin is the reward, and the reward model is never asked."""
    return resolve_toy(
        compose_config(
            [
                *SMALL,
                f"run.dir={folder}",
                "rl.reward=random",
                "rl.prompts_per_step=2",
                "rl.group_size=2",
                "rl.sampling.max_new_tokens=24",
                "evaluation.max_new_tokens=24",
                "data.eval_problems=toy:eval:2",
                *overrides,
            ]
        )
    )


@pytest.mark.parametrize("end", ["stop", "error"])
def test_a_run_that_ends_early_lets_go_of_its_engines(
    tmp_path: Path, monkeypatch, end: str
) -> None:
    """Servers that live on would keep the trainer's process group, its paused requests and the
    weights on disk; after a request to stop and after an error they are told, as after the last
    step.
    """
    config, closed = tiny(tmp_path), []

    async def sync_close(sync: WeightSync) -> None:
        closed.append("sync")

    monkeypatch.setattr(WeightSync, "close", sync_close)
    original = RolloutManager.close
    monkeypatch.setattr(
        RolloutManager, "close", lambda rollouts: (closed.append("rollouts"), original(rollouts))
    )
    if end == "stop":
        (tmp_path / "stage3/random").mkdir(parents=True)
        (tmp_path / "stage3/random/STOP").touch()
        assert stage3.run_stage3(config) is False
    else:

        def fail(*_: object, **__: object) -> None:
            raise NonFiniteGradient("here")

        monkeypatch.setattr(GRPOTrainer, "update", fail)
        with pytest.raises(NonFiniteGradient):
            stage3.run_stage3(config)
    assert closed == ["sync", "rollouts"]


def test_a_run_goes_on_with_the_data_and_models_that_it_began_with(tmp_path: Path) -> None:
    """The fingerprint in a checkpoint has the content of the problems, the policy and the reward
    model, so that another file under the same name is another run, and the same file in
    another place is not.
    """
    config = tiny(tmp_path, "rl.reward=process_aware", f"rl.reward_model={ASSETS / 'verifier'}")
    problems = read_problems(config.data.rl_problems)
    made = stage3.run_fingerprint(config, problems)
    assert made == stage3.run_fingerprint(
        replace(config, data=replace(config.data, rl_problems="elsewhere")), problems
    )
    assert made != stage3.run_fingerprint(
        config, problems[::-1]
    ) and made != stage3.run_fingerprint(config, problems[:-1])
    other = replace(config, models=replace(config.models, policy=str(ASSETS / "critic")))
    assert {
        name
        for name, value in stage3.run_fingerprint(other, problems).items()
        if value != made[name]
    } == {"models.policy"}
    judged = replace(config, rl=replace(config.rl, reward_model=str(ASSETS / "critic")))
    assert {
        name
        for name, value in stage3.run_fingerprint(judged, problems).items()
        if value != made[name]
    } == {"rl.reward_model", "the reward model"}
