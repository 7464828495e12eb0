"""RL variants of the pipeline: their list, their configurations, and the jobs they wait for."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.designs import asks_reward_model, designs, needs_step_labels
from spark_nemo.config.reward import VARIANTS, ModelReward
from spark_nemo.planning.dry_run import dry_run
from spark_nemo.planning.preflight import check_pipeline, check_stage3
from spark_nemo.run.compose import compose_config
from spark_nemo.run.job_graph import build_job_graph
from spark_nemo.run.rl_variants import RLVariant, pipeline_rl_variants, rl_variant_config
from spark_nemo.run.run_folder import mark_done, stage2_folder
from spark_nemo.toy.resolve import ASSETS, resolve_toy

EVERYTHING = [
    "+experiment=toy",
    "run.dir=runs/x",
    f"pipeline.rewards=[{','.join(designs())}]",
    "pipeline.variants=[prm_cot,prm,orm]",
]
KNOBS = [
    "rl.reward.votes=3",
    "rl.reward.sampling.temperature=1.0",
    "rl.reward.queue=7",
    "rl/estimator=rloo",
    "rl/shaping=overlong",
    "rl.shaping.buffer=20",
]
"""Set for the whole pipeline; no design reads all of them."""


def jobs_of(overrides: list[str]) -> dict:
    return {job.name: job for job in build_job_graph(compose_config(overrides), overrides)}


def test_the_demo_has_the_jobs_folders_and_arguments_it_always_had() -> None:
    """Pinned: the shipped figures are of these commands and folders."""
    overrides = ["+experiment=toy", "run.dir=runs/x"]
    jobs = jobs_of(overrides)
    assert {name: str(job.folder) for name, job in jobs.items() if "stage1" not in name} == {
        **{
            f"stage2-{m}": f"runs/x/stage2/{m}"
            for m in ("step_consistency", "single", "outcome_consistency")
        },
        **{f"stage3-{name}": f"runs/x/stage3/{name}" for name in ("process_aware", "rlvr")},
    }
    assert jobs["stage2-single"].arguments == ("stage2", *overrides, "stage2.method=single")
    assert jobs["stage3-process_aware"].arguments == (
        "stage3",
        *overrides,
        "++rl/reward=process_aware",
    )
    assert jobs["stage3-rlvr"].arguments == (
        "stage3",
        *overrides,
        "++rl/reward=rlvr",
        "data.rl_answers=toy:rl:2000",
    )


def test_designs_times_kinds_of_reward_model_without_what_an_orm_cannot_reward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each baseline once, process-aware with all three kinds, designs of step labels with two.

    A log line names each RL variant that is left out.
    """
    with caplog.at_level(logging.INFO):
        jobs = jobs_of(EVERYTHING)
    rl_variants = pipeline_rl_variants(compose_config(EVERYTHING))
    by_design = {
        design: [each.variant for each in rl_variants if each.design == design]
        for design in designs()
    }
    assert all(by_design[design] == [None] for design in designs() if not asks_reward_model(design))
    assert by_design["process_aware"] == list(VARIANTS)
    assert all(
        by_design[design] == ["prm_cot", "prm"] for design in designs() if needs_step_labels(design)
    )
    assert [f"RL variant {d}-orm" in caplog.text for d in designs()] == [
        needs_step_labels(d) for d in designs()
    ]
    # Shards, kinds of the own method, the other methods, RL variants.
    assert len(jobs) == 2 + 3 + 2 + len(rl_variants)


def test_what_failures_cost_goes_to_the_designs_that_can_fail() -> None:
    """Set for the whole pipeline, it reaches the variants that query a reward model; the answer
    checker is not retried, and votes and coins never fail. Each variant is a configuration that is
    accepted.
    """
    config = compose_config([*EVERYTHING, "rl.reward.failures.max_rate=1.0", "rl.reward.retries=3"])
    for variant in pipeline_rl_variants(config):
        reward = rl_variant_config(config, variant).rl.reward
        if isinstance(reward, ModelReward):
            assert (reward.failures.max_rate, reward.retries) == (1.0, 3)
        elif variant.design == "rlvr":
            assert reward.failures.max_rate == 1.0 and not hasattr(reward, "retries")
        else:
            assert not hasattr(reward, "failures")


def test_an_arm_waits_for_its_own_reward_model_and_a_baseline_for_nobody() -> None:
    """Also the names of folders: a PRM-CoT's has no suffix."""
    jobs = jobs_of(EVERYTHING)
    assert jobs["stage3-selective"].after == {"stage2-step_consistency"}
    assert jobs["stage3-selective-prm"].after == {"stage2-step_consistency-prm"}
    assert jobs["stage3-process_aware-orm"].after == {"stage2-step_consistency-orm"}
    assert {jobs[f"stage3-{baseline}"].after for baseline in ("rlvr", "majority", "random")} == {
        frozenset()
    }
    assert str(jobs["stage3-process_aware-orm"].folder) == "runs/x/stage3/process_aware-orm"
    orm = jobs["stage2-step_consistency-orm"]
    assert (
        str(orm.folder) == "runs/x/stage2/step_consistency-orm"
        and "stage2.variant=orm" in orm.arguments
    )
    assert "stage2-single" in jobs and "stage2-single-prm" not in jobs


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [],
        KNOBS,
        ["rl/advantage=selective", "rl.advantage.min_steps=4"],
        ["rl/advantage=global_step_penalty", "rl.advantage.max_steps=6"],
    ],
)
def test_every_job_is_configured_as_its_rl_variant_was_checked(more: list[str]) -> None:
    """The command line of every RL variant composes to the configuration that was checked before.

    A job resets the settings that its own design does not read, so the job cannot fail on them.
    """
    overrides = [*EVERYTHING, *more]
    config, jobs = compose_config(overrides), jobs_of(overrides)
    for variant in pipeline_rl_variants(config):
        checked = rl_variant_config(config, variant)
        composed = compose_config(list(jobs[f"stage3-{variant.name}"].arguments[1:]))
        assert composed.rl == checked.rl and composed.data == checked.data
        assert (checked.rl_variant, checked.rl.design, checked.reward_variant) == (
            variant.name,
            variant.design,
            variant.variant,
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pipeline.rewards=[capo]", "pipeline.rl_answers=null", "stage2.variant=orm"],
            "an ORM produces none",
        ),
        (["pipeline.variants=[prm,orm]"], "add stage2.variant=prm_cot"),
        (["pipeline.variants=[prm_cot,prm]", "rl.reward.model=x"], "rl.reward.model=x"),
        (["rl.reward.variant=prm"], "rl.reward.variant=prm"),
        (
            [
                "pipeline.variants=[prm_cot]",
                "pipeline.label_methods=[]",
                "pipeline.rewards=[]",
                "pipeline.rl_answers=null",
            ],
            "pipeline.variants",
        ),
        (["pipeline.rounds=2", "pipeline.variants=[prm_cot,prm]"], "pipeline.rounds=2"),
        (
            ["pipeline.rewards=[process_aware,rlvr]", "pipeline.rl_answers=null"],
            "set pipeline.rl_answers",
        ),
        (["pipeline.rewards=[sideways]"], "sideways"),
        (
            [
                "pipeline.rewards=[process_aware]",
                "pipeline.rl_answers=null",
                "pipeline.label_methods=[single]",
            ],
            "add it to pipeline.label_methods",
        ),
    ],
)
def test_arms_that_cannot_run_are_refused_before_the_first_starts(
    overrides: list[str], message: str
) -> None:
    """One line, from the plan alone."""
    with pytest.raises(ConfigError) as error:
        dry_run(compose_config(["+experiment=toy", *overrides]))
    assert message in str(error.value) and "\n" not in str(error.value)


def small(tmp_path: Path, *overrides: str) -> SparkConfig:
    return resolve_toy(
        compose_config(
            [
                "+experiment=toy",
                f"run.dir={tmp_path}/run",
                "data.stage1_problems=toy:stage1:4",
                "data.rl_problems=toy:rl:4",
                "data.eval_problems=toy:eval:4",
                "data.processbench=toy:processbench:12",
                "rl.prompts_per_step=4",
                "pipeline.rl_answers=toy:rl:4",
                *overrides,
            ]
        )
    )


def test_the_pipeline_checks_every_rl_variant(tmp_path: Path) -> None:
    """Inputs of a single RL variant are checked before any starts: here the answers of rlvr."""
    check_pipeline(
        small(
            tmp_path,
            "pipeline.rewards=[random,selective,rlvr]",
            "pipeline.variants=[prm_cot,prm,orm]",
        )
    )
    config = small(tmp_path, "pipeline.rewards=[random,rlvr]", "pipeline.rl_answers=toy:rl:3")
    with pytest.raises(ConfigError, match=r"RL variant rlvr: .*no answer for"):
        check_pipeline(config)


def test_a_reward_model_is_asked_as_what_it_was_trained_as(tmp_path: Path) -> None:
    """Its own folder says what it is; asking it as another kind would send a prompt it has never
    seen. Says nothing about folders without a DONE.json, such as a model from elsewhere.
    """
    config = small(tmp_path)
    folder = stage2_folder(config.run, "step_consistency", "prm_cot")
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(ASSETS / "verifier")
    mark_done(folder, {"variant": "prm_cot"})
    check_stage3(config)
    named = replace(
        config,
        rl=replace(
            config.rl, reward=replace(config.rl.reward, model=str(folder / "model"), variant="prm")
        ),
    )
    with pytest.raises(ConfigError, match="trained as prm_cot"):
        check_stage3(named)
    assert json.loads((folder / "DONE.json").read_text())["variant"] == "prm_cot"


def test_an_orm_cannot_reward_steps_whichever_way_it_is_named(tmp_path: Path) -> None:
    """By stage2.variant as by rl.reward.variant."""
    with pytest.raises(ConfigError, match="an ORM does not produce"):
        check_stage3(
            small(tmp_path, "stage2.variant=orm", "rl/reward=step_average"),
            reward_model_comes_later=True,
        )
    check_stage3(small(tmp_path, "stage2.variant=orm"), reward_model_comes_later=True)


def test_the_plan_names_every_rl_variant_and_marks_the_one_that_reads_answers() -> None:
    """One line per RL variant; majority vote and the coin read no answers."""
    plan = dry_run(compose_config(EVERYTHING)).splitlines()
    marked = [line for line in plan if line.startswith("stage III") and "READS ANSWER KEYS" in line]
    assert len(marked) == 1 and "rlvr" in marked[0]
    assert any("stage III    process_aware-orm:" in line for line in plan)
    assert (
        RLVariant("rlvr", None).reads_answer_keys
        and not RLVariant("majority", None).reads_answer_keys
    )


def test_a_pipeline_with_votes_can_have_the_baseline_without_a_verifier() -> None:
    """Proves that the job of the baseline leaves out settings that it does not have."""
    asked = [
        "+experiment=toy",
        "rl.reward.votes=3",
        "rl.reward.sampling.temperature=1.0",
        "rl.reward.deadline_s=9",
        "rl.reward.probes=4",
        "rl.reward.constraints.max_steps=9",
        "rl.reward.constraints.no_empty_steps=false",
        "pipeline.rewards=[process_aware,rlvr]",
        "pipeline.rl_answers=keys.jsonl",
    ]
    config = compose_config(asked)
    rewards = {
        job.name.removeprefix("stage3-"): compose_config(list(job.arguments[1:])).rl.reward
        for job in build_job_graph(config, asked)
        if job.name.startswith("stage3-")
    }
    assert rewards["process_aware"].votes == 3 and not hasattr(rewards["rlvr"], "votes")
