"""Outcomes of the hacking simulator over seeds: a section of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spark_nemo.report.display_names import words
from spark_nemo.report.summary import SummaryError
from studies.document_sections import markdown_table, mean_cell, titled_section

SECTION = "hacking"
FOUND = 0.5
"""Share of a run's last responses that must use an exploit for it to count as found."""
_NOTES = """\
For each exploit there is one scripted judge: honest by the toy task's hidden truth, with one
planted weakness. The policy starts from the shipped generator, which has never seen an exploit,
so a short SFT gives it the habit first: a small share of that text uses the exploit (the list has
the share), and most of its solutions are wrong, so that solving is not the easier way ({before} %
solved before RL). Everything after that is stage III itself, {steps} steps of {responses}
responses, rewarded with `process_aware`. "Uses it" is the rate of the run's own detector and
"reward" the mean, both over the last three training steps; "solved" is true accuracy of sampled
answers on held-out problems, whose answers no reward has seen. Mean and half-width of Student's
95% interval over seeds; a seed draws other problems and samples, and the policy at the start is
the same. "Found" counts the seeds in which at least half of the responses use the exploit. The
two columns of a quantity differ in the constraint alone.

Finding an exploit is a race with honest solving, which these rewards pay as well. An exploit that
is rarely tried can lose it, and then the constraint is not what kept it away. Overlong lost in
one seed of three when its share was 8 %, because its text is long and a model of this size seldom
gets to the end of it; hence its larger share.

What this does not show: that these constraints close the weaknesses of a real reward model. Each
weakness is known here, planted alone, and closed by the rule that is made for it. Rules that
bound tokens or steps fit these problems because the lengths of their solutions are known."""

Outcome = Mapping[str, float]
"""A run's ``outcome.json``."""


@dataclass(frozen=True, slots=True)
class ExploitRow:
    """One exploit with every seed's outcome, without and with its constraint."""

    name: str
    weakness: str
    constraint: str
    share: float
    """Share of the base policy's SFT text that uses the exploit."""
    without: Sequence[Outcome]
    constrained: Sequence[Outcome]


def hacking_section(rows: Sequence[ExploitRow], command: str, *, steps: int, responses: int) -> str:
    """Return the section; raises ``SummaryError`` without rows or when a run is missing."""
    counts = {len(runs) for row in rows for runs in (row.without, row.constrained)}
    if len(counts) != 1 or counts == {0}:
        raise SummaryError(
            f"every exploit needs the same number of seeds, with its constraint and without, "
            f"got {sorted(counts)}"
        )
    header = ["exploit"]
    for quantity in ("found", "uses it", "reward", "solved"):
        header += [f"{quantity}, without", "with"]
    lines = []
    legend = []
    for row in rows:
        cells = [words(row.name), _found(row.without), _found(row.constrained)]
        for key in ("rate_last", "reward_last", "accuracy_last"):
            cells += [_mean(row.without, key), _mean(row.constrained, key)]
        lines.append(cells)
        legend.append(
            f"* **{words(row.name)}**: the judge {row.weakness}; closed by {row.constraint}; in "
            f"{100 * row.share:.0f} % of the SFT text."
        )
    before = _mean([outcome for row in rows for outcome in row.without], "accuracy_first")
    notes = _NOTES.format(steps=steps, responses=responses, before=before.split(" ")[0])
    [count] = counts
    title = (
        "Reward hacking, without its constraint and with it, over "
        f"{count} seed{'s' if count > 1 else ''}"
    )
    parts = [markdown_table(header, lines), "\n".join(legend), notes]
    return titled_section(SECTION, title, command, parts)


def _mean(outcomes: Sequence[Outcome], key: str) -> str:
    return mean_cell([outcome[key] for outcome in outcomes], 100)


def _found(outcomes: Sequence[Outcome]) -> str:
    found = sum(outcome["rate_last"] >= FOUND for outcome in outcomes)
    return f"{found} of {len(outcomes)}"
