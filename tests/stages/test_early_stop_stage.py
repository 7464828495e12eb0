"""Early stopping in the real stage, with the toy task's engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from world import run

from spark_nemo.records import VERIFICATION, outcome_from_json
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.early_stop import StoppingRule, votes_taken

pytestmark = pytest.mark.slow


def votes(folder: Path) -> dict[str, dict[int, dict]]:
    found: dict[str, dict[int, dict]] = {}
    with RecordStore(folder / "stage1/store") as store:
        for _, row in store.iter(VERIFICATION):
            found.setdefault(row["solution_key"], {})[row["vote"]] = row
    return found


def test_the_stage_takes_the_votes_that_a_replay_takes(tmp_path: Path, collected: Path) -> None:
    """Proves that a run with the exact rule is a part of the full run: the same votes, and none
    after a decision.

    Ledger and statistics say how many were spared. The rules themselves have their own tests.
    """
    done = run("stage1", tmp_path, "stage1.early_stop=exact")
    assert done.returncode == 0, done.stderr
    full, stopped, rule = votes(collected), votes(tmp_path), StoppingRule(4)
    wanted = {
        key: {
            vote: rows[vote]
            for vote in range(
                votes_taken(rule, [outcome_from_json(rows[vote]["outcome"]) for vote in range(4)])
            )
        }
        for key, rows in full.items()
    }
    assert stopped == wanted
    spared = sum(map(len, full.values())) - sum(map(len, stopped.values()))
    assert spared > 0
    stats = json.loads((tmp_path / "stage1/stats-shard-all.json").read_text())
    ledger = json.loads((tmp_path / "stage1/token_accounting-shard-all.json").read_text())
    assert stats["saved_verifications"] == ledger["early_stop"]["votes_saved"] == spared
    assert ledger["this_run"]["verify"]["sampled"] == sum(map(len, stopped.values()))
    assert ledger["this_run"]["verify"]["sampled_completion_tokens"] == stats["verification_tokens"]
