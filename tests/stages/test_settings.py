"""Which differences in configuration make another run."""

from __future__ import annotations

from dataclasses import asdict

from spark_nemo.config import RLConfig
from spark_nemo.config.compose import compose_config
from spark_nemo.config.designs import SHAPING_KNOBS, VERIFIER_KNOBS
from spark_nemo.config.hacking import ConstraintsConfig, DetectorsConfig, HackingConfig
from spark_nemo.run.job_graph import _stage3_job
from spark_nemo.run.rl_variants import pipeline_rl_variants
from spark_nemo.run.run_folder import comparable_rl


def test_unset_is_the_same_run_as_the_default_written_out() -> None:
    """A folder whose config.yaml or checkpoint says std_normalize=true and token_mean can be
    resumed by default.
    """
    unset, written = RLConfig(), RLConfig(std_normalize=True, loss_aggregation="token_mean")
    other = RLConfig(std_normalize=False)
    assert (
        comparable_rl(asdict(unset))
        == comparable_rl(asdict(written))
        != comparable_rl(asdict(other))
    )
    assert comparable_rl(comparable_rl(asdict(unset))) == comparable_rl(asdict(unset))


def test_a_folder_from_before_the_verifiers_settings_is_the_same_run() -> None:
    """Absent is what not set means; a folder made with one vote is not resumed with three, one made
    without shaping not with it.
    """
    now = comparable_rl(asdict(RLConfig()))
    new = VERIFIER_KNOBS.keys() | SHAPING_KNOBS.keys() | {"reward_variant"}
    before = {name: value for name, value in asdict(RLConfig()).items() if name not in new}
    assert comparable_rl(before) == now
    assert now != comparable_rl({**before, "verifier_votes": 3}) and now != comparable_rl(
        {**now, "overlong_buffer": 9}
    )


def test_a_pipeline_with_votes_can_have_the_baseline_without_a_verifier() -> None:
    """The verifier's settings, errors for a reward that has none, are taken back for its job alone."""
    asked = [
        "+experiment=toy",
        "rl.verifier_votes=3",
        "rl.verifier_sampling.temperature=1.0",
        "rl.verifier_deadline=9",
        "rl.hacking.probes=4",
        "rl.hacking.constraints.max_steps=9",
        "rl.hacking.constraints.no_empty_steps=false",
        "pipeline.rewards=[process_aware,rlvr]",
        "pipeline.rl_answers=keys.jsonl",
    ]
    config = compose_config(asked)
    jobs = {
        arm.name: _stage3_job(config, asked, arm).arguments[1:]
        for arm in pipeline_rl_variants(config)
    }
    votes = {
        reward: compose_config(list(arguments)).rl.verifier_votes
        for reward, arguments in jobs.items()
    }
    assert votes == {"process_aware": 3, "rlvr": 1}


def test_of_the_hacking_settings_only_constraints_make_another_run() -> None:
    """Detectors and probes watch and change nothing; a folder from before they existed is the same
    run.
    """
    now = comparable_rl(asdict(RLConfig()))
    watched = RLConfig(
        hacking=HackingConfig(probes=3, top_rewards=0, detectors=DetectorsConfig(alarm=0.5))
    )
    bounded = RLConfig(hacking=HackingConfig(ConstraintsConfig(max_steps=9)))
    before = {name: value for name, value in asdict(RLConfig()).items() if name != "hacking"}
    assert (
        comparable_rl(asdict(watched))
        == comparable_rl(before)
        == now
        != comparable_rl(asdict(bounded))
    )
