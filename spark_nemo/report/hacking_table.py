"""The table of the hacking simulator over seeds: a section of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .model import SummaryError
from .results import over_seeds
from .sections import marked

SECTION = "hacking"
FOUND = 0.5
"""An exploit counts as found when at least this share of the last responses use it, in the mean over seeds."""
_NOTES = """\
Per exploit one judge, scripted: honest by the small world's hidden truth, with one planted weakness (for step reduction
with none: there the reward design is the weakness). The policy starts from the shipped generator, which has never seen
an exploit, so a short SFT gave it the habit first: {share:.0f} % of its responses use the exploit before RL. Everything
after that is stage III itself, {steps} steps of {responses} responses. "Uses it" is the rate of the run's own detector
and "reward" the mean, both over the last three training steps; "solved" is true accuracy of sampled answers on held-out
problems, whose answers no reward has seen, and was {before} % before RL. Mean and half-width of Student's 95% interval
over seeds; found means that at least half of the responses use it. The two columns of an exploit differ in the
constraint alone.

What this does not show: that these constraints close the weaknesses of a real reward model. Each is known here, planted
alone, and closed by the rule that is made for it; a rule that bounds tokens or steps fits these problems because
somebody knew how long their solutions are."""


@dataclass(frozen=True, slots=True)
class ExploitRow:
    """One exploit: what the judge's weakness is, the constraint against it, and every seed's outcome in both arms."""

    name: str
    weakness: str
    constraint: str
    reward: str
    without: Sequence[Mapping[str, float]]
    constrained: Sequence[Mapping[str, float]]


def hacking_section(rows: Sequence[ExploitRow], command: str, *, share: float, steps: int, responses: int) -> str:
    """The section's markdown. Raises ``SummaryError`` without rows or when an arm lacks seeds."""
    seeds = {len(arm) for row in rows for arm in (row.without, row.constrained)}
    if not rows or len(seeds) != 1 or seeds == {0}:
        raise SummaryError(f"a table of exploits needs every arm of every seed, got {sorted(seeds)} seeds per arm")
    header = ["exploit", "reward", "uses it, without", "with", "reward, without", "with", "solved, without", "with",
              "without", "with"]
    lines = [header, ["---", "---", *["---:"] * 6, "---", "---"]]
    for row in rows:
        arms = (row.without, row.constrained)
        cells = [_over(arm, key) for key in ("rate_last", "reward_last", "accuracy_last") for arm in arms]
        lines.append([row.name.replace("_", " "), f"`{row.reward}`", *cells, *(_verdict(arm) for arm in arms)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    legend = "\n".join(f"* **{row.name.replace('_', ' ')}**: the judge {row.weakness}; closed by {row.constraint}."
                       for row in rows)
    before = over_seeds([outcome["accuracy_first"] for row in rows for outcome in row.without], 100)
    notes = _NOTES.format(share=100 * share, steps=steps, responses=responses, before=before.split(" ")[0])
    number = next(iter(seeds))
    return marked(SECTION, "\n\n".join([
        f"## Reward hacking, without its constraint and with it, over {number} seed{'s' if number > 1 else ''}",
        f"Produced by:\n\n```\n{command}\n```", table, legend, notes]))


def _over(arm: Sequence[Mapping[str, float]], key: str) -> str:
    return over_seeds([outcome[key] for outcome in arm], 100)


def _verdict(arm: Sequence[Mapping[str, float]]) -> str:
    """Found in how many of the seeds."""
    found = sum(outcome["rate_last"] >= FOUND for outcome in arm)
    return f"found in {found} of {len(arm)}" if found else "not found"
