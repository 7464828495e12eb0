"""Choice of one verification among a solution's votes (SPARK, arXiv 2512.03244, section 3.1).

The choice is one whole verification, never text from several, or ``Dropped`` with the reason. A
random choice among equally good verifications depends on the seed, the name of the choice and the
solution's key alone: not on the order of the votes, on other solutions, or on sharding.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spark_nemo.config import LabelsConfig
from spark_nemo.records import (
    MetaCritique,
    Solution,
    Verdict,
    Verification,
    VoteCount,
    count_votes,
    derive_seed,
    majority,
    outcome_kind,
)


@dataclass(frozen=True, slots=True)
class LabelInputs:
    """Everything that a vote choice or a label method may read about one solution."""

    solution: Solution
    verifications: Sequence[Verification]
    seed: int
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    meta_critiques: Mapping[str, MetaCritique] = field(default_factory=dict)
    """By the key of the verification they are about."""


@dataclass(frozen=True, slots=True)
class VoteChoice:
    """The chosen verification, drawn from ``matching`` equally good ones.

    ``rule`` is one of the names that ``LabelEvidence.chosen_by`` lists.
    """

    verification: Verification
    count: VoteCount
    matching: int
    rule: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A solution without a label; ``reason`` is a metric key such as ``tie`` or ``no_match``."""

    reason: str


def choose_single(inputs: LabelInputs) -> VoteChoice | Dropped:
    """Choose vote 0; drop the solution if vote 0 failed, even if later votes are usable.

    The method is for a budget of N = 1. Taking the first vote that parses would give it up to
    N attempts, and keep solutions on the strength of one rare verification.
    """
    first = next((v for v in inputs.verifications if v.vote == 0), None)
    if first is None:
        return Dropped("vote_0_missing")
    if not isinstance(first.outcome, Verdict):
        return Dropped(f"vote_0_{outcome_kind(first.outcome)}")
    return VoteChoice(first, count_votes([first.outcome]), 1, "first_vote")


def choose_outcome_consistency(inputs: LabelInputs) -> VoteChoice | Dropped:
    """Choose a random verification among those whose final verdict is the majority's."""
    count = count_votes(v.outcome for v in inputs.verifications)
    if count.num_votes == 0:
        return Dropped("no_votes")
    verdict = resolve_tie(majority(count.yes_votes, count.num_votes), inputs.labels)
    if verdict is None:
        return Dropped("tie")
    matching = [v for v in votes_with_verdict(inputs) if v.outcome.answer_correct == verdict]
    chosen = draw("outcome_consistency", inputs, matching)
    return VoteChoice(chosen, count, len(matching), "verdict_majority")


def votes_with_verdict(inputs: LabelInputs) -> list[Verification]:
    """The verifications that parsed to a verdict, in the order of their vote numbers."""
    parsed = [v for v in inputs.verifications if isinstance(v.outcome, Verdict)]
    return sorted(parsed, key=lambda v: v.vote)


def resolve_tie(decision: bool | None, labels: LabelsConfig) -> bool | None:
    """A majority, where ``labels.ties`` decides about a tie (None)."""
    if decision is None and labels.ties == "incorrect":
        return False
    return decision


def draw(choice: str, inputs: LabelInputs, candidates: Sequence[Verification]) -> Verification:
    """A random candidate. ``choice`` is the name of the vote choice and part of the seed."""
    seed = derive_seed("label", choice, inputs.solution.key, inputs.seed)
    return random.Random(seed).choice(candidates)
