"""``spark-nemo data`` and ``explain`` on what the real stage I command left."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from world import run

from spark_nemo.cli.main import main
from spark_nemo.records import SOLUTION, VERIFICATION
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.store_reader import label_store, stream_solutions


def test_a_collected_store_verifies(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The audit derives the collector's keys from fingerprint.json alone, and every verification
    names its solution as parent. Under another seed all keys are wrong.
    """
    assert main(["data", "verify", str(collected)]) == 0
    made_by = json.loads((collected / "stage1/fingerprint.json").read_text())
    with RecordStore(collected / "stage1/store") as store:
        keys = {kind: store.keys(kind) for kind in (SOLUTION, VERIFICATION)}
        for key, payload in store.iter(VERIFICATION):
            assert store.parent(key, VERIFICATION) == payload["solution_key"]
    copy = collected.parent / "copy"
    shutil.copytree(collected, copy, dirs_exist_ok=True)
    (copy / "stage1/fingerprint.json").write_text(json.dumps({**made_by, "run.seed": 1}))
    capsys.readouterr()
    assert main(["data", "verify", str(copy)]) == 1
    found = capsys.readouterr().out
    assert f"{sum(map(len, keys.values()))} findings" in found


@pytest.mark.slow
def test_a_finished_stage_says_so_and_more_problems_are_more_work(
    collected: Path, tmp_path: Path
) -> None:
    """Proves the same command on a finished store ends with one line and loads no model, and that a
    longer problem file is sampled, not taken for done.
    """
    copy = tmp_path / "copy"
    shutil.copytree(collected, copy)
    again = run("stage1", copy)
    assert again.returncode == 0 and f"complete in {copy}/stage1/shard-all" in again.stdout
    assert json.loads((copy / "stage1/shard-all/DONE.json").read_text())["solutions"] == 20
    more = run("stage1", copy, "data.stage1_problems=toy:stage1:11")
    assert more.returncode == 0 and "is complete" not in more.stdout, more.stderr
    done = json.loads((copy / "stage1/shard-all/DONE.json").read_text())
    assert done["solutions"] == 22 and done["reused"] >= 20


def test_every_label_can_be_explained(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every label of a real run, its target verification is found and shown in full."""
    run = shutil.copytree(collected, tmp_path / "run")
    with RecordStore(run / "stage1/store") as store:
        labelled, dropped = label_store("step_consistency", store, 0)
        solutions = sum(1 for _ in stream_solutions(store))
    assert labelled and len(labelled) + sum(dropped.values()) == solutions
    path = run / "stage2/step_consistency/labels.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(asdict(label)) + "\n" for label in labelled))
    for label in labelled:
        assert main(["explain", str(run), label.solution.key]) == 0
        shown = capsys.readouterr().out
        assert f"vote {label.evidence.chosen_vote}: " in shown and label.solution.question in shown
        assert all(f"    | {line}" in shown for line in label.target_text.split("\n"))
