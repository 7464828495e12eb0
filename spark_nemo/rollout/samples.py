"""Rows of a step in the run folder's JSONL files, for a person to read; nothing here trains."""

from __future__ import annotations

import json
import random
from pathlib import Path

from spark_nemo.records import ParsedResponse, Rollout, Verdict, outcome_to_json
from spark_nemo.utils.files import write_text_atomic

from .batch import RolloutBatch

SAMPLES = "samples.jsonl"
SAMPLES_PER_STEP = 4


def sample_rows(batch: RolloutBatch, step: int) -> list[dict[str, object]]:
    """Return a few random rollouts of a batch with the verdict on each step."""
    count = min(SAMPLES_PER_STEP, len(batch.rollouts))
    # Seeded by the step, so that a resumed run writes the same rows.
    chosen = random.Random(step).sample(range(len(batch.rollouts)), count)
    return [sample_row(batch.rollouts[index], step) for index in sorted(chosen)]


def sample_row(rollout: Rollout, step: int) -> dict[str, object]:
    """Return one rollout with everything that was decided about it."""
    parsed = rollout.parsed
    steps = list(parsed.step_texts) if isinstance(parsed, ParsedResponse) else None
    step_labels = violation = outcome = None
    if rollout.verdict is not None:
        if rollout.verdict.violation is not None:
            violation = rollout.verdict.violation.rule
        if rollout.verdict.outcome is not None:
            outcome = outcome_to_json(rollout.verdict.outcome)
        if isinstance(rollout.verdict.outcome, Verdict):
            step_labels = list(rollout.verdict.outcome.step_labels)
    return {
        "step": step,
        "problem_id": rollout.problem.problem_id,
        "question": rollout.problem.question,
        "text": rollout.text,
        "steps": steps,
        "step_labels": step_labels,
        "violation": violation,
        "outcome": outcome,
        "reward": rollout.reward if rollout.valid else None,
    }


def rewrite_rows(path: Path, step: int, rows: list[dict[str, object]]) -> None:
    """Put ``rows`` at ``step`` and drop rows from that step on: a resumed run writes them again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    new = [json.dumps(row) for row in rows]
    write_text_atomic(path, "".join(line + "\n" for line in [*kept, *new]))
