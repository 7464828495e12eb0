"""Settings that do, and do not, distinguish two RL runs."""

from __future__ import annotations

from dataclasses import asdict

from spark_nemo.config import RLConfig
from spark_nemo.config.hacking import ConstraintsConfig, DetectorsConfig, HackingConfig
from spark_nemo.config.registry import choose
from spark_nemo.config.reward import HeldoutVerifier, ModelReward
from spark_nemo.run.compose import compose_config
from spark_nemo.run.job_graph import _stage3_job
from spark_nemo.run.rl_variants import pipeline_rl_variants
from spark_nemo.run.run_folder import comparable_rl


def test_a_pipeline_with_votes_can_have_the_baseline_without_a_verifier() -> None:
    """A reward without a reward model does not have its settings, so its job leaves them out."""
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
    jobs = {
        variant.name: _stage3_job(config, asked, variant).arguments[1:]
        for variant in pipeline_rl_variants(config)
    }
    votes = {
        reward: getattr(compose_config(list(arguments)).rl.reward, "votes", None)
        for reward, arguments in jobs.items()
    }
    assert votes == {"process_aware": 3, "rlvr": None}


def test_what_only_monitors_makes_no_other_run() -> None:
    """Detectors, probes and the held-out verifier do not affect training; constraints do."""
    now = comparable_rl(asdict(RLConfig()))
    hacking = HackingConfig(top_rewards=0, detectors=DetectorsConfig(alarm=0.5))
    monitored = ModelReward(probes=3, heldout=HeldoutVerifier(model="other"))
    bounded = ModelReward(constraints=ConstraintsConfig(max_steps=9))
    assert comparable_rl(asdict(RLConfig(hacking=hacking, reward=monitored))) == now
    assert comparable_rl(asdict(RLConfig(reward=bounded))) != now


def test_another_option_is_another_run() -> None:
    """The name of an option is among the settings, also where it has no other."""
    now = comparable_rl(asdict(RLConfig()))
    assert comparable_rl(asdict(RLConfig(estimator=choose("rl/estimator", "rloo")))) != now
