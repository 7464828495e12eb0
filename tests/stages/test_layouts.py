"""One configuration under several parallel layouts, through the real command and its launcher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from world import VERIFIER, rows, run

pytestmark = pytest.mark.slow
LAYOUTS = {
    "one": [],
    "tp2": ["megatron.tensor_parallel=2"],
    "pp2": ["megatron.pipeline_parallel=2"],
    "dp2": ["megatron.data_parallel=2"],
}


def first_step(stage: str, folder: Path, layout: str, *overrides: str) -> dict:
    short = {
        "stage2": ["stage2.epochs=1", "stage2.batch_size=64"],
        "stage3": [f"rl.reward.model={VERIFIER}", "rl.steps=1"],
    }[stage]
    done = run(stage, folder, *LAYOUTS[layout], *short, *overrides)
    assert done.returncode == 0, done.stderr
    return rows(next(folder.glob(f"{stage}/*/metrics.jsonl")))[0]


@pytest.fixture(scope="module")
def stage2_alone(tmp_path_factory: pytest.TempPathFactory, collected: Path) -> dict:
    """The first step of stage II in a single process."""
    return first_step(
        "stage2", shutil.copytree(collected, tmp_path_factory.mktemp("one") / "run"), "one"
    )


@pytest.fixture(scope="module")
def stage3_alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The first step of stage III in a single process."""
    return first_step("stage3", tmp_path_factory.mktemp("one"), "one")


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_the_first_loss_of_stage2_does_not_depend_on_the_layout(
    tmp_path: Path, collected: Path, stage2_alone: dict, layout: str
) -> None:
    """Proves 1e-4 agreement of the first loss and gradient norm; later steps may drift apart in the
    last digits.
    """
    other = first_step("stage2", shutil.copytree(collected, tmp_path / layout), layout)
    assert other["loss"] == pytest.approx(stage2_alone["loss"], abs=1e-4)
    assert other["grad_norm"] == pytest.approx(stage2_alone["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_the_first_loss_of_stage3_does_not_depend_on_the_layout(
    tmp_path: Path, stage3_alone: dict, layout: str
) -> None:
    """Proves it for GRPO with engine, judge and weight sync in the loop: the first rollouts are the
    same tokens.
    """
    other = first_step("stage3", tmp_path, layout)
    assert other["reward"] == stage3_alone["reward"]
    assert other["loss"] == pytest.approx(stage3_alone["loss"], abs=1e-4)
    assert other["grad_norm"] == pytest.approx(stage3_alone["grad_norm"], rel=1e-3)


def test_the_first_loss_with_step_advantages_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    """Proves that advantages that differ from token to token reach the loss through packing and
    every split alike.
    """
    steps = {
        name: first_step("stage3", tmp_path / name, name, "rl/advantage=global_step")
        for name in ("one", "tp2", "pp2", "dp2")
    }
    for name, step in steps.items():
        assert step["loss"] == pytest.approx(steps["one"]["loss"], abs=1e-5), name
        assert step["grad_norm"] == pytest.approx(steps["one"]["grad_norm"], rel=1e-4), name


def test_a_step_ahead_with_dynamic_sampling_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    """Proves it over two data-parallel ranks, of which one generates in the background while both
    train: the second batch comes from the first weights, so it is the same tokens, and the losses
    agree.
    """
    knobs = [
        f"rl.reward.model={VERIFIER}",
        "rl.steps=2",
        "rl.rollout.one_step_off=true",
        "rl/rollout/filter=dynamic",
        "rl.rollout.filter.over_sampling_ratio=1.5",
    ]
    steps = {}
    for layout in ("one", "dp2"):
        done = run("stage3", tmp_path / layout, *LAYOUTS[layout], *knobs)
        assert done.returncode == 0, done.stderr
        steps[layout] = rows(tmp_path / layout / "stage3/process_aware/metrics.jsonl")
    for one, two, lag in zip(steps["one"], steps["dp2"], (0.0, 1.0), strict=True):
        assert one["weight_lag"] == two["weight_lag"] == lag
        assert (one["reward"], one["sampled_tokens"]) == (two["reward"], two["sampled_tokens"])
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
