"""Labels and reward models round by round over seeds: a section of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spark_nemo.report.summary import Figure, SummaryError, read_summary
from studies.document_sections import markdown_table, mean_cell, titled_section

SECTION = "rounds"
_NOTES = """\
In round 1 the verifier votes. From round 2 on, the reward model trained in the round before votes
on the same solutions, and step consistency makes new labels from its votes. Every round's reward
model starts from the same base. Means over seeds and the half-width of Student's 95% interval
over seeds.

What this does not show: that rounds help where the first round leaves more to learn, or that many
rounds do not drift. Answer keys and true labels are used for this table only."""


def round_section(by_seed: Mapping[int, Mapping[str, Any]], command: str) -> str:
    """Return the section from summaries of runs; raises ``SummaryError`` if their rounds differ."""
    runs = [read_summary(summary) for summary in by_seed.values()]
    counts = {len(run.rounds) for run in runs}
    if len(counts) != 1 or counts == {0}:
        raise SummaryError(f"runs must have the same number of rounds, got {sorted(counts)}")
    rows = []
    for entries in zip(*(run.rounds for run in runs)):
        labels = [entry.labels for entry in entries if entry.labels]
        missing = [None] * (len(entries) - len(labels))
        steps = [_value(scores.step_accuracy) for scores in labels]
        first_errors = [_value(scores.first_error_accuracy) for scores in labels]
        rows.append(
            [
                str(entries[0].number),
                mean_cell([*steps, *missing], 100),
                mean_cell([*first_errors, *missing], 100),
                mean_cell([*(scores.share_kept for scores in labels), *missing], 100),
                mean_cell([_value(entry.f1) for entry in entries], 100),
            ]
        )
    header = ["round", "correct steps", "correct first error", "solutions kept", "F1 of its model"]
    title = f"Rounds: the reward model as the next verifier, over {len(runs)} seeds"
    return titled_section(SECTION, title, command, [markdown_table(header, rows), _NOTES])


def _value(figure: Figure | None) -> float | None:
    return figure.value if figure else None
