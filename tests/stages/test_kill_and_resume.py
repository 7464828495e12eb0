"""kill -9 in each stage, then the same command again: nothing finished is lost, and the losses are
the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from world import VERIFIER, rows, run, run_and_kill

from spark_nemo.records import SOLUTION, VERIFICATION
from spark_nemo.records.store import RecordStore

pytestmark = pytest.mark.slow


def records(folder: Path) -> dict[str, dict]:
    if not (folder / "stage1/store").is_dir():
        return {}
    with RecordStore(folder / "stage1/store") as store:
        return {**dict(store.iter(SOLUTION)), **dict(store.iter(VERIFICATION))}


def test_stage1_keeps_every_stored_result_and_does_only_what_is_missing(
    tmp_path: Path, collected: Path
) -> None:
    """Proves resume after SIGKILL by content: the union equals an undisturbed run, and the second
    run reuses.

    Does not prove durability against power loss; the store's own tests cover torn writes.
    """
    wanted = ["data.stage1_problems=toy:stage1:60"]
    run_and_kill("stage1", tmp_path, lambda: len(records(tmp_path)) >= 40, *wanted)
    before = records(tmp_path)
    done = run("stage1", tmp_path, *wanted)
    assert done.returncode == 0, done.stderr
    after = records(tmp_path)
    stats = json.loads((tmp_path / "stage1/stats-shard-all.json").read_text())
    assert len(before) < len(after)
    assert all(after[key] == payload for key, payload in before.items())
    assert stats["reused"] == len(before)
    assert stats["solutions"] == 120
    assert records(collected).keys() <= after.keys(), (
        "the first ten problems have the same keys in every run"
    )


def test_growing_stage1_to_more_votes_samples_only_the_new_ones(
    tmp_path: Path, collected: Path
) -> None:
    """N=4 grown to N=6 keeps the four votes. Does not cover a changed sampling setting."""
    folder = shutil.copytree(collected, tmp_path / "grown")
    before = records(folder)
    done = run("stage1", folder, "stage1.verifications_per_solution=6")
    assert done.returncode == 0, done.stderr
    stats = json.loads((folder / "stage1/stats-shard-all.json").read_text())
    assert stats["reused"] == len(before)
    assert stats["verifications"] == 6 * (stats["solutions"] - stats["unusable_solutions"])


def test_stage2_losses_after_sigkill_equal_an_undisturbed_run(
    tmp_path: Path, collected: Path
) -> None:
    """Proves exact resume of fine-tuning: every logged number is the same, not merely close."""
    calm, killed = (shutil.copytree(collected, tmp_path / name) for name in ("calm", "killed"))
    metrics = killed / "stage2/step_consistency/metrics.jsonl"
    assert run("stage2", calm).returncode == 0
    run_and_kill("stage2", killed, lambda: len(rows(metrics)) >= 4)
    assert run("stage2", killed).returncode == 0
    assert rows(metrics) == rows(calm / "stage2/step_consistency/metrics.jsonl")
    scores = [
        json.loads((f / "stage2/step_consistency/processbench.json").read_text())
        for f in (calm, killed)
    ]
    assert scores[0] == scores[1]


def test_stage3_losses_after_sigkill_equal_an_undisturbed_run(tmp_path: Path) -> None:
    """Proves exact resume of RL: rollouts, rewards, losses, evaluations, the watch for hacking (a
    held-out verifier too) and the final weights are the same.
    """
    folders = {name: tmp_path / name for name in ("calm", "killed")}
    judge = (
        f"rl.reward.model={VERIFIER}",
        "rl/reward/heldout=verifier",
        f"rl.reward.heldout.model={VERIFIER}",
        "rl.reward.heldout.every=2",
    )
    metrics = folders["killed"] / "stage3/process_aware/metrics.jsonl"
    done = run("stage3", folders["calm"], *judge)
    assert done.returncode == 0, done.stderr
    run_and_kill("stage3", folders["killed"], lambda: len(rows(metrics)) >= 3, *judge)
    assert run("stage3", folders["killed"], *judge).returncode == 0
    calm, killed = (folders[name] / "stage3/process_aware" for name in ("calm", "killed"))
    assert rows(calm / "metrics.jsonl") == rows(killed / "metrics.jsonl")
    assert [row["step"] for row in rows(calm / "metrics.jsonl") if "hacking/reward_gap" in row] == [
        0,
        2,
        4,
    ]
    for name in ("evaluations.jsonl", "hacking.jsonl", "top_rewards.jsonl"):
        assert rows(calm / name) == rows(killed / name) != []
    assert (calm / "model/model.safetensors").read_bytes() == (
        killed / "model/model.safetensors"
    ).read_bytes()
