"""An ORM through the real commands: trained and scored by stage II, asked by stage III."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from world import rows, run

pytestmark = pytest.mark.slow


def test_an_orm_is_trained_scored_and_asked(tmp_path: Path, collected: Path) -> None:
    """Its folders, its score under names of its own and no ProcessBench file; then a step of RL
    whose verifications are asked of it (``verifier.jsonl``) and read without step labels. A dozen
    examples teach it nothing; how well it judges is not tested.
    """
    folder = shutil.copytree(collected, tmp_path / "run")
    done = run("stage2", folder, "stage2.variant=orm", "stage2.epochs=1")
    assert done.returncode == 0, done.stderr[-2000:]
    model = folder / "stage2/step_consistency-orm"
    score = json.loads((model / "whole_solution.json").read_text())
    assert (
        0 <= score["verdict_harmonic_mean"] <= 1 and len(score["cases"]) == 30 and "f1" not in score
    )
    assert not (model / "processbench.json").exists() and "f1" not in json.loads(
        (model / "DONE.json").read_text()
    )
    done = run(
        "stage3",
        folder,
        "rl.reward.variant=orm",
        "rl.steps=1",
        "rl.eval_every=1",
        "rl.reward.failures.max_rate=1.0",
        "rl/reward/failures=penalize",
        "rl.reward.failures.penalty=0.0",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    variant = folder / "stage3/process_aware-orm"
    [step], [asked] = (rows(variant / name) for name in ("metrics.jsonl", "verifier.jsonl"))
    assert "correct_step_fraction" not in step and step["reward"] <= 1 and asked["asked"] > 0
    kinds = {row["outcome"]["kind"] for row in rows(variant / "samples.jsonl") if row["outcome"]}
    assert kinds <= {"answer_verdict", "parse_failure", "truncated"}
