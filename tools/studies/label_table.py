"""The table of label quality by method over seeds: a section between markers, inside
docs/results.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from spark_nemo.report.display_names import METHOD_NAMES
from spark_nemo.report.summary import LabelScores, SummaryError
from studies.document_sections import marked
from studies.results_document import over_seeds

SECTION = "label quality"
_NOTES = """\
A mean over seeds and the half-width of Student's 95% interval over seeds; a seed draws other problems, solutions,
verifications and critiques of the same three models, which are not trained again. Accuracies are over the solutions
that a method kept. Tokens are all that verifier, critic and merge generate for a method, no prompts and not the
solution itself; "per solution" counts every solution the method was given, "per label" only those that got one.

What this does not show: how the methods compare with other models. The small world's critic makes mistakes of its own
by design (`toy/critic.py`), and the order of the methods depends on how good it is. Reference-guided labels are a
baseline that reads answer keys; in the small world its verifications are written by the critic model, which has learned
that prompt, and not by the verifier."""


def label_section(by_seed: Mapping[int, Mapping[str, LabelScores]], command: str) -> str:
    """The section's markdown, markers included. Raises ``SummaryError`` without seeds or when
    methods differ.
    """
    if not by_seed:
        raise SummaryError("label quality needs at least one seed")
    methods = list(next(iter(by_seed.values())))
    if any(list(scores) != methods for scores in by_seed.values()):
        raise SummaryError("label quality: the seeds have different methods")
    header = [
        "labels from",
        "steps right",
        "first error right",
        "solutions kept",
        "tokens per solution",
        "tokens per label",
    ]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for method in methods:
        scores = [seed[method] for seed in by_seed.values()]
        rows.append(
            [
                METHOD_NAMES.get(method, method),
                over_seeds(
                    [s.step_accuracy.value if s.step_accuracy else None for s in scores], 100
                ),
                over_seeds(
                    [
                        s.first_error_accuracy.value if s.first_error_accuracy else None
                        for s in scores
                    ],
                    100,
                ),
                over_seeds([s.share_kept for s in scores], 100),
                over_seeds([s.tokens_per_solution for s in scores]),
                over_seeds([s.tokens_per_label for s in scores]),
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    seeds = f"{len(by_seed)} seeds" if len(by_seed) > 1 else "one seed"
    return marked(
        SECTION,
        "\n\n".join(
            [
                f"## Labels against the hidden truth, over {seeds}",
                f"Produced by:\n\n```\n{command}\n```",
                table,
                _NOTES,
            ]
        ),
    )
