"""The table of labels and reward models round by round over seeds: a section of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spark_nemo.report.summary import SummaryError, read_summary
from studies.document_sections import marked
from studies.results_document import over_seeds

SECTION = "rounds"
_NOTES = """\
In round 1 the verifier votes. From round 2 on the reward model that the round before trained votes on the same
solutions, and step consistency makes the labels anew. Every round's reward model starts from the same base. Means over
seeds and the half-width of Student's 95% interval over seeds.

What this does not show: that rounds help where the first round leaves more to learn, or that they do not drift when
there are many. No answer key and no true label is read by any of it but this table."""


def round_section(by_seed: Mapping[int, Mapping[str, Any]], command: str) -> str:
    """The section's markdown from summaries of runs with rounds. Raises ``SummaryError`` when their
    rounds differ.
    """
    runs = [read_summary(summary) for summary in by_seed.values()]
    numbers = [[entry.number for entry in run.rounds] for run in runs]
    if not runs or any(each != numbers[0] for each in numbers) or not numbers[0]:
        raise SummaryError(f"a table of rounds needs runs of equally many rounds, got {numbers}")
    rows = [
        ["round", "steps right", "first error right", "solutions kept", "F1 of its reward model"],
        ["---", *["---:"] * 4],
    ]
    for entries in zip(*(run.rounds for run in runs)):
        labels = [entry.labels for entry in entries]
        rows.append(
            [
                str(entries[0].number),
                over_seeds(
                    [
                        each.step_accuracy.value if each and each.step_accuracy else None
                        for each in labels
                    ],
                    100,
                ),
                over_seeds(
                    [
                        each.first_error_accuracy.value
                        if each and each.first_error_accuracy
                        else None
                        for each in labels
                    ],
                    100,
                ),
                over_seeds([each.share_kept if each else None for each in labels], 100),
                over_seeds([entry.f1.value if entry.f1 else None for entry in entries], 100),
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return marked(
        SECTION,
        "\n\n".join(
            [
                f"## Rounds: the reward model as the next verifier, over {len(runs)} seeds",
                f"Produced by:\n\n```\n{command}\n```",
                table,
                _NOTES,
            ]
        ),
    )
