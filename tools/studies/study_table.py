"""The paper's comparisons over seeds: a section of docs/results.md.

They are label methods, kinds of reward model and reward designs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spark_nemo.report.display_names import method_name, rl_variant_name
from spark_nemo.report.seed_comparison import POLICY_FAMILY, Comparison, Pair, compare_runs
from spark_nemo.report.summary import SummaryError
from studies.document_sections import markdown_table, mean_cell, titled_section

SECTION = "study"
_NOTES = """\
Means over seeds and the half-width of Student's 95% interval over seeds. A seed draws other
problems, solutions and verifications and trains every reward model and policy again. A difference
is taken seed by seed and marked "differs" only when its interval excludes 0. One pair in twenty
does so by chance, and there are many pairs here.

PRM and ORM answer without writing a check down, and a model of this size cannot tell a correct
sum from a wrong one that way. After the three epochs that a PRM-CoT needs, the PRM also loses its
format on benchmark cases, which end without the answer line of its training texts: hence its F1.
RL against such a reward learns to please it and to solve less than before; rollouts without a
verdict were masked.

What this does not show: how the designs rank on another model, or when RL goes on for longer.
"Does not differ" means that these seeds show no difference, not that there is none. The toy
task's generator errs in a few known ways and does not have the habit of pleasing its judge, so
designs that differ in what they resist may look alike here: the section on reward hacking is
about that."""


def study_section(by_seed: Mapping[int, Mapping[str, Any]], command: str) -> str:
    """Return the section from summaries of one pipeline over several seeds.

    Reward models are compared with step consistency's PRM-CoT, policies with RLVR. Raises
    ``SummaryError`` when a run lacks one of the two.
    """
    comparison = compare_runs([("", summary) for summary in by_seed.values()])
    parts = []
    for family in comparison.families:
        parts += [f"### {family}", _family_table(comparison, family)]
    title = f"Label methods, kinds of reward model and reward designs, over {len(by_seed)} seeds"
    return titled_section(SECTION, title, command, [*parts, _NOTES])


def _family_table(comparison: Comparison, family: str) -> str:
    if family == POLICY_FAMILY:
        reference = rl_variant_name("rlvr")
    else:
        reference = method_name("step_consistency")
    quantities = [quantity for quantity in comparison.quantities if quantity.family == family]
    if reference not in [quantity.name for quantity in quantities]:
        raise SummaryError(
            f"the study compares with {reference!r}, which no run has under {family!r}"
        )
    pairs = [pair for pair in comparison.pairs if pair.family == family]
    rows = []
    for quantity in quantities:
        pair = _against(pairs, quantity.name, reference)
        rows.append(
            [
                quantity.name,
                mean_cell(list(quantity.values.values()), 100),
                _difference(pair) if pair else "",
                str(len(quantity.values)),
                pair.verdict if pair else "",
            ]
        )
    header = ["", "mean", f"minus {reference}", "seeds", "verdict"]
    return markdown_table(header, rows, left=(0, 4))


def _against(pairs: Sequence[Pair], name: str, reference: str) -> Pair | None:
    """Return ``name`` minus ``reference``; None for the reference itself."""
    for pair in pairs:
        if (pair.first, pair.second) == (name, reference):
            return pair
        if (pair.first, pair.second) == (reference, name):
            return replace(pair, first=name, second=reference, mean=-pair.mean)
    return None


def _difference(pair: Pair) -> str:
    text = f"{100 * pair.mean:+.1f}"
    if pair.half is not None:
        text += f" ± {100 * pair.half:.1f}"
    return text
