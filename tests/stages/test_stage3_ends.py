"""Runs of stage III that do not reach their end, and runs that must not resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from world import SMALL

from spark_nemo.config import SparkConfig
from spark_nemo.megatron import NonFiniteGradient
from spark_nemo.rollout.manager import RolloutManager
from spark_nemo.run.compose import compose_config
from spark_nemo.stages import stage3
from spark_nemo.toy.resolve import resolve_toy
from spark_nemo.training.grpo_trainer import GRPOTrainer
from spark_nemo.weight_sync.synchronizer import WeightSync


def tiny(folder: Path, *overrides: str) -> SparkConfig:
    """A run of seconds: a coin is the reward, and the reward model is never asked."""
    return resolve_toy(
        compose_config(
            [
                *SMALL,
                f"run.dir={folder}",
                "rl/reward=random",
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
