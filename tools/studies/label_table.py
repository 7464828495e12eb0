"""Label quality by method over seeds: a section of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping

from spark_nemo.report.display_names import METHOD_NAMES
from spark_nemo.report.summary import Figure, LabelScores, SummaryError
from studies.document_sections import markdown_table, mean_cell, titled_section

SECTION = "label quality"
_NOTES = """\
Means over seeds and the half-width of Student's 95% interval over seeds. A seed draws other
problems, solutions, verifications and critiques of the same three models, which are not trained
again. Accuracies are over the solutions that a method kept. Tokens are all that verifier, critic
and merge generate for a method, without prompts and without the solution itself; "per solution"
counts every solution that the method was given, "per label" only those with a label.

What this does not show: how the methods compare with other models. The toy task's critic makes
mistakes of its own by design (`toy/critic.py`), and the order of the methods depends on how good
it is. Reference-guided labels are a baseline that reads answer keys; in the toy task its
verifications are written by the critic model, which has learned that prompt, and not by the
verifier."""


def label_section(by_seed: Mapping[int, Mapping[str, LabelScores]], command: str) -> str:
    """Return the section; raises ``SummaryError`` without seeds or when their methods differ."""
    if not by_seed:
        raise SummaryError("label quality needs at least one seed")
    methods = list(next(iter(by_seed.values())))
    if any(list(scores) != methods for scores in by_seed.values()):
        raise SummaryError("label quality: the seeds have different methods")
    header = [
        "labels from",
        "correct steps",
        "correct first error",
        "solutions kept",
        "tokens per solution",
        "tokens per label",
    ]
    rows = []
    for method in methods:
        scores = [seed[method] for seed in by_seed.values()]
        rows.append(
            [
                METHOD_NAMES.get(method, method),
                mean_cell([_value(each.step_accuracy) for each in scores], 100),
                mean_cell([_value(each.first_error_accuracy) for each in scores], 100),
                mean_cell([each.share_kept for each in scores], 100),
                mean_cell([each.tokens_per_solution for each in scores]),
                mean_cell([each.tokens_per_label for each in scores]),
            ]
        )
    seeds = f"{len(by_seed)} seeds" if len(by_seed) > 1 else "one seed"
    title = f"Labels against the hidden truth, over {seeds}"
    return titled_section(SECTION, title, command, [markdown_table(header, rows), _NOTES])


def _value(figure: Figure | None) -> float | None:
    return figure.value if figure else None
