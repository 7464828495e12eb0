"""Rounds of labelling: from round 2 on the reward model of the round before is the verifier."""

from __future__ import annotations

import json

import pytest
from world import run

from spark_nemo.cli.main import main
from spark_nemo.config import ConfigError
from spark_nemo.records.store import RecordStore
from spark_nemo.run.compose import compose_config
from spark_nemo.run.job_graph import build_job_graph

ROUNDS = (
    "pipeline.rounds=2",
    "pipeline.rewards=[]",
    "pipeline.label_methods=[step_consistency]",
    "pipeline.rl_answers=null",
    "pipeline.parallel_jobs=1",
    "stage1.max_failure_rate=1.0",
)


@pytest.mark.slow
def test_the_second_round_verifies_the_same_solutions_with_the_first_reward_model(tmp_path) -> None:
    """Same solutions, other votes, from another model. Does not show that the labels get better."""
    run_dir = tmp_path / "run"
    done = run("pipeline", run_dir, *ROUNDS)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (
        RecordStore(folder / "stage1/store") for folder in (run_dir, run_dir / "round-2")
    )
    assert first.keys("solution") == second.keys("solution")
    assert not first.keys("verification") & second.keys("verification")
    made_by = [
        json.loads((folder / "stage1/fingerprint.json").read_text())
        for folder in (run_dir, run_dir / "round-2")
    ]
    assert made_by[0]["models.generator"] == made_by[1]["models.generator"]
    for folder in (run_dir, run_dir / "round-2"):
        assert main(["data", "verify", str(folder)]) == 0
    assert made_by[0]["models.verifier"] != made_by[1]["models.verifier"]
    stats = json.loads((run_dir / "round-2/stage1/stats-shard-0-of-1.json").read_text())
    assert stats["solution_tokens"] == 0 and stats["verification_tokens"] > 0
    assert (run_dir / "round-2/stage2/step_consistency/DONE.json").exists()
    rounds = json.loads((run_dir / "summary.json").read_text())["rounds"]
    assert [r["number"] for r in rounds] == [1, 2] and all(
        r["labels"]["step_accuracy"] and r["f1"] for r in rounds
    )


def test_stage_three_waits_for_the_last_round_and_is_rewarded_by_it() -> None:
    """The plan alone; nothing runs."""
    overrides = ["+experiment=toy", "run.dir=runs/x", "pipeline.rounds=3"]
    jobs = {job.name: job for job in build_job_graph(compose_config(overrides), overrides)}
    rl = jobs["stage3-process_aware"]
    assert rl.after == {"round3-stage2-step_consistency"}
    assert "rl.reward.model=runs/x/round-3/stage2/step_consistency/model" in rl.arguments
    assert jobs["round2-stage1-0"].after == {"stage2-step_consistency"}
    assert jobs["stage2-single"].after == jobs["stage2-step_consistency"].after


def test_a_reward_model_that_writes_no_verifications_cannot_verify() -> None:
    """A prm only writes Correct or Incorrect per step, which a prm_cot cannot be trained on."""
    with pytest.raises(ConfigError, match=r"pipeline\.rounds=2.*stage2\.variant is prm"):
        compose_config(["+experiment=toy", "pipeline.rounds=2", "stage2.variant=prm"])
