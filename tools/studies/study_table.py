"""The paper's comparisons over seeds: label methods, kinds of reward model, reward designs. A
section of results.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spark_nemo.report.display_names import arm_name, method_name
from spark_nemo.report.seed_comparison import Comparison, Pair, compare_runs
from spark_nemo.report.summary import SummaryError
from studies.document_sections import marked
from studies.results_document import over_seeds

SECTION = "study"
_NOTES = """\
Means over seeds and the half-width of Student's 95% interval over seeds; a seed draws other problems, solutions and
verifications and trains every reward model and policy again. A difference is taken seed by seed and marked "differs"
only when its interval excludes 0. One pair in twenty does so by chance, and there are many pairs here.

PRM and ORM answer without writing a check down, and a model of this size cannot tell a right sum from a wrong one that
way. After the three epochs that a PRM-CoT needs, the PRM also loses its format on benchmark cases, which end without
the answer line that its training texts have: hence its F1. RL against such a reward learns to please it and to solve
less than before; what gave no verdict was masked.

What this does not show: how the designs rank on another model, or when RL goes on for longer. "Does not differ" means
that these seeds show no difference, not that there is none. The small world's generator errs in a few known ways and
has no habit of pleasing its judge, so designs that differ in what they resist may look alike here: the section on
reward hacking is about that."""


def study_section(by_seed: Mapping[int, Mapping[str, Any]], command: str) -> str:
    """The section's markdown from summaries of one pipeline over several seeds.

    Reward models are compared with step consistency's PRM-CoT, policies with RLVR. Raises
    ``SummaryError`` when a run lacks one of the two.
    """
    comparison = compare_runs([("", summary) for summary in by_seed.values()])
    return marked(
        SECTION,
        "\n\n".join(
            [
                f"## Label methods, kinds of reward model and reward designs, over {len(by_seed)} seeds",
                f"Produced by:\n\n```\n{command}\n```",
                *(
                    part
                    for family in dict.fromkeys(
                        quantity.family for quantity in comparison.quantities
                    )
                    for part in (f"### {family}", _family_table(comparison, family))
                ),
                _NOTES,
            ]
        ),
    )


def _family_table(comparison: Comparison, family: str) -> str:
    quantities = [quantity for quantity in comparison.quantities if quantity.family == family]
    reference = (
        arm_name("rlvr") if family.startswith("Policies") else method_name("step_consistency")
    )
    if reference not in [quantity.name for quantity in quantities]:
        raise SummaryError(
            f"the study compares with {reference!r}, which no run has under {family!r}"
        )
    rows = [
        ["", "mean", f"minus {reference}", "seeds", "verdict"],
        ["---", "---:", "---:", "---:", "---"],
    ]
    for quantity in quantities:
        pair = _against(comparison.pairs, quantity.name, reference, family)
        rows.append(
            [
                quantity.name,
                over_seeds(list(quantity.values.values()), 100),
                _signed(pair) if pair else "",
                str(len(quantity.values)),
                pair.verdict if pair else "",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _against(pairs: Sequence[Pair], name: str, reference: str, family: str) -> Pair | None:
    """``name`` minus ``reference``; None for the reference itself."""
    for pair in pairs:
        if pair.family == family and (pair.first, pair.second) == (name, reference):
            return pair
        if pair.family == family and (pair.first, pair.second) == (reference, name):
            return replace(pair, first=name, second=reference, mean=-pair.mean)
    return None


def _signed(pair: Pair) -> str:
    half = "" if pair.half is None else f" ± {100 * pair.half:.1f}"
    return f"{100 * pair.mean:+.1f}{half}"
