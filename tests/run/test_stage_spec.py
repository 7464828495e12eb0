"""The table of the stages: which differences in settings and files make another run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from spark_nemo.config import SparkConfig
from spark_nemo.records.fingerprint import flatten_settings
from spark_nemo.run.completion import resume_fingerprint, stage_fingerprint
from spark_nemo.run.compose import compose_config
from spark_nemo.run.stage_spec import (
    PIPELINE_FREE_ON_RESUME,
    PIPELINE_SAME_ON_RESUME,
    STAGES,
    is_same_in_pipeline,
    setting,
)
from spark_nemo.toy.resolve import ASSETS, resolve_toy


def composed(folder: Path, *overrides: str) -> SparkConfig:
    """The toy task's configuration with its files in ``folder``."""
    return resolve_toy(compose_config(["+experiment=toy", f"run.dir={folder}", *overrides]))


def differing(first: dict[str, object], second: dict[str, object]) -> set[str]:
    """Names whose values differ, missing ones included."""
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def test_every_name_in_the_table_is_a_setting() -> None:
    """Every row names an existing setting: a renamed one would silently lose its rule."""
    config = SparkConfig()
    for spec in STAGES.values():
        for name in (*spec.inputs, *spec.same_on_resume, *spec.free_on_resume):
            setting(config, name)
    for name in (*PIPELINE_FREE_ON_RESUME, *PIPELINE_SAME_ON_RESUME):
        setting(config, name)


@pytest.mark.parametrize("stage", STAGES)
def test_what_resume_must_keep_is_an_input(stage: str) -> None:
    """Proves that whatever makes a resume fail makes a finished run incomplete as well."""
    config = SparkConfig()
    inputs = stage_fingerprint(config, stage).keys()
    assert resume_fingerprint(config, stage).keys() <= inputs


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("rl.group_size=3", {"rl.group_size"}),
        ("rl.reward.constraints.max_steps=9", {"rl.reward.constraints.max_steps"}),
        ("rl/estimator=rloo", {"rl.estimator.name", "rl.estimator.std_normalize"}),
        ("rl.reward.probes=3", set()),
        ("rl.hacking.top_rewards=0", set()),
        ("rl.save_every=7", set()),
        ("rl.reward.variant=prm_cot", set()),
        ("evaluation.samples_per_problem=9", set()),
        ("stage1.solutions_per_problem=9", set()),
    ],
)
def test_stage3_may_resume_with_another_setting_unless_its_steps_depend_on_it(
    tmp_path: Path, override: str, changed: set[str]
) -> None:
    """Proves that saving, watching and evaluating may change, and what is trained may not."""
    before = resume_fingerprint(composed(tmp_path), "stage3")
    assert differing(before, resume_fingerprint(composed(tmp_path, override), "stage3")) == changed


def test_stage3_resumes_with_the_data_and_models_that_it_began_with(tmp_path: Path) -> None:
    """Proves that problems, policy and reward model count by content: another file under the same
    name is another run, and the same file in another place is not.
    """
    config = composed(tmp_path, f"rl.reward.model={ASSETS / 'verifier'}")
    before = resume_fingerprint(config, "stage3")
    problems = Path(config.data.rl_problems)
    moved = problems.with_name("elsewhere.jsonl")
    moved.write_bytes(problems.read_bytes())
    elsewhere = replace(config, data=replace(config.data, rl_problems=str(moved)))
    assert resume_fingerprint(elsewhere, "stage3") == before
    problems.write_text(problems.read_text().split("\n", 1)[1])
    assert differing(before, resume_fingerprint(config, "stage3")) == {"data.rl_problems"}

    problems.write_bytes(moved.read_bytes())
    other = replace(config, models=replace(config.models, policy=str(ASSETS / "critic")))
    assert differing(before, resume_fingerprint(other, "stage3")) == {"models.policy"}
    judged = replace(
        config,
        rl=replace(config.rl, reward=replace(config.rl.reward, model=str(ASSETS / "critic"))),
    )
    assert differing(before, resume_fingerprint(judged, "stage3")) == {
        "rl.reward.model",
        "the reward model",
    }


def test_a_pipeline_may_change_how_it_works_and_not_what_it_makes() -> None:
    """A run folder keeps the pipeline's rounds and no setting of the engine."""
    names = [name for name, _ in flatten_settings(asdict(SparkConfig()))]
    kept = {name for name in names if is_same_in_pipeline(name)}
    assert {
        "pipeline.rounds",
        "rl.steps",
        "stage1.prompt_set",
        "rl.reward.constraints.max_steps",
    } < kept
    assert not {"pipeline.parallel_jobs", "rl.reward.retries", "rl.reward.probes"} & kept
    assert not [name for name in kept if name.startswith(("engine.", "sft."))]
