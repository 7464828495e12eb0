"""Answers stay on their side: no record of stages I to III can hold one, and poisoned ones change nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from world import VERIFIER, rows, run

from spark_nemo import records
from spark_nemo.toy.data import write_answers

FORBIDDEN = ("gold", "truth", "reference", "answer_key", "expected")


def test_no_record_has_a_field_for_an_answer_key() -> None:
    """Proves it for every dataclass of ``records`` by field name and type; a verdict's ``answer_correct`` is a vote.

    Does not prove that nobody hides an answer in a question's text.
    """
    types = [t for t in vars(records).values() if isinstance(t, type) and dataclasses.is_dataclass(t)]
    assert len(types) >= 10
    for record in types:
        for field in dataclasses.fields(record):
            assert field.name != "answer" and not any(word in field.name for word in FORBIDDEN), (record, field.name)
            assert "AnswerKey" not in str(field.type) and "EvalProblem" not in str(field.type), (record, field.name)


def test_no_room_below_the_stages_knows_what_an_answer_key_is() -> None:
    """Proves records, grammar and verification have no name of an answer's type and no import of the room that has: the
    reference-guided baseline and balancing by ground truth reach them as closures. Import-linter says the same of
    imports; this says it of type hints and strings too."""
    package = Path(records.__file__).parents[1]
    sources = [path for room in ("records", "grammar", "verification") for path in (package / room).glob("*.py")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text()
        found = [name for name in ("AnswerKey", "EvalProblem", "answer_keys", "answer_matches") if name in text]
        assert not found, (path, found)


@pytest.mark.slow
def test_poisoned_evaluation_answers_change_no_training_number_and_no_weight(tmp_path: Path) -> None:
    """Proves RL with the reward model never reads an answer: only the evaluations differ. Stages I and II are given no
    file that holds one."""
    honest = write_answers("eval", 12, 0, tmp_path)
    poisoned = tmp_path / "poisoned.jsonl"
    poisoned.write_text("".join(
        json.dumps({**json.loads(line), "answer": "-1"}) + "\n" for line in honest.read_text().splitlines()))
    folders = []
    for name, path in (("honest", honest), ("poisoned", poisoned)):
        done = run("stage3", tmp_path / name, f"rl.reward_model={VERIFIER}", "rl.steps=2", f"data.eval_problems={path}")
        assert done.returncode == 0, done.stderr
        folders.append(tmp_path / name / "stage3/process_aware")
    first, second = folders
    assert rows(first / "metrics.jsonl") == rows(second / "metrics.jsonl")
    assert (first / "model/model.safetensors").read_bytes() == (second / "model/model.safetensors").read_bytes()
    assert rows(first / "evaluations.jsonl") != rows(second / "evaluations.jsonl")
    assert all(row["sampled"]["value"] == 0 for row in rows(second / "evaluations.jsonl"))
