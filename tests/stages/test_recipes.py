"""The paper's experiments as recipes: each one is valid, planned, and says where a value is ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spark_nemo.cli.main import main
from spark_nemo.config import ConfigError
from spark_nemo.config.compose import compose_config, config_folder
from spark_nemo.stages.plan import dry_run

RECIPES = sorted((config_folder() / "experiment/spark").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Proves --dry-run validates each recipe (layouts against the published model sizes, contexts) without any file,
    writes nothing, and says which engine to add: the embedded one is for small models. With it, both pools are in the
    plan. Does not prove that a recipe trains well."""
    command = ["pipeline", f"+experiment=spark/{path.stem}", f"run.dir={tmp_path}/run", "--dry-run"]
    assert main([*command, "+engine=sglang"]) == 0
    assert "sglang, policy pool: 2 to launch here" in capsys.readouterr().out
    assert main(command) == 0
    plan = capsys.readouterr().out
    assert "add +engine=sglang" in plan and "trainer ranks" in plan
    assert "size unknown" not in plan and not (tmp_path / "run").exists()
    assert ("READS ANSWER KEYS" in plan) == ("rlvr" in path.stem or "reference" in path.stem)


def test_the_papers_numbers_are_in_the_base_recipe() -> None:
    """Proves the figures that the paper or its scripts state; every recipe builds on this one."""
    config = compose_config(["+experiment=spark/base"])
    assert (config.stage1.solutions_per_problem, config.stage1.verifications_per_solution) == (8, 16)
    assert (config.rl.prompts_per_step, config.rl.group_size, config.rl.updates_per_step) == (256, 16, 1)
    assert (config.rl.optimizer.lr, config.rl.kl_coef, config.rl.kl_estimator) == (1e-6, 0.001, "k3")
    assert (config.stage1.generator_sampling.temperature, config.stage1.verifier_sampling.temperature) == (0.7, 0.8)
    plan = dry_run(config)
    assert "2,048 prompt + 2,048 response tokens" in plan
    assert "8 solutions, 128 verifications, at most 1,114,112 generated tokens" in plan
    assert "200 steps, 819,200 rollouts" in plan


@pytest.mark.parametrize("path", [p for p in RECIPES if "defaults:" in p.read_text()], ids=lambda path: path.stem)
def test_a_recipe_says_only_what_differs_and_keeps_its_own_folder(path: Path) -> None:
    """Proves two recipes never share a run folder, which would refuse the second."""
    assert re.search(rf"dir: runs/spark/{path.stem}\b", path.read_text())
    assert len(path.read_text().splitlines()) < 25


@pytest.mark.parametrize(("override", "message"), [
    ("rl.sampling.max_new_tokens=3073", "rl.sampling: 4097 tokens with 1024 for the problem, but models.policy="),
    ("evaluation.max_new_tokens=4096", "context of 4096 here: lower max_new_tokens"),
    ("engine.max_context=8192", "or raise engine.max_context"),
    ("megatron.tensor_parallel=8", "megatron.tensor_parallel"),
    ("megatron.pipeline_parallel=3", "megatron.pipeline_parallel"),
    ("stage2.variant=orm pipeline.rewards=[step_average]", "an ORM gives none"),
    ("stage2.method=single", "add it to pipeline.label_methods"),
    ("models.policy=''", "models.policy is not set"),
])
def test_a_plan_that_cannot_work_is_refused(override: str, message: str) -> None:
    """Proves the 4,096-token context of Qwen2.5-Math-7B binds (3,072 response tokens are the most), and so do layouts
    and the parts' needs of each other."""
    with pytest.raises(ConfigError) as raised:
        dry_run(compose_config(["+experiment=spark/base", *override.split()]))
    assert message in str(raised.value)


def test_the_longest_response_that_leaves_room_for_a_prompt_is_allowed() -> None:
    """Proves the other side of the limit: 1,024 + 3,072 = 4,096."""
    plan = dry_run(compose_config(["+experiment=spark/base", "rl.sampling.max_new_tokens=3072"]))
    assert "1,024 prompt + 3,072 response" in plan


def test_the_small_world_has_a_plan_too() -> None:
    """Proves counts come from the data where they are known: 240 problems, 4 solutions, 16 verifications of each."""
    plan = dry_run(compose_config(["+experiment=toy"]))
    assert "240 problems: 960 solutions, 15,360 verifications" in plan and "embedded engine" not in plan
