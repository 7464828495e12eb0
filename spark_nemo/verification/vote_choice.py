"""Which of a solution's verifications to go on with (SPARK, arXiv 2512.03244, section 3.1, methods
1 to 3).

A pick is one whole verification, never a splice of several, or ``Dropped`` with the reason. The
random choice among equally good verifications depends on the seed, the way of picking and the
solution's key alone: not on the order of the list, on other solutions, or on how the work was
sharded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spark_nemo.config import LabelsConfig
from spark_nemo.records import Solution, Verdict, Verification, derive_seed, outcome_kind

from .voting import VoteCount, count_votes, majority


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """What the paper leaves open. The defaults drop a solution whenever its label would be
    doubtful.

    ``ties``: ``drop`` the solution, or count a tied step (or final verdict) as ``incorrect``.

    ``no_match``: when no verification agrees with every step's majority, ``drop`` the solution, or
    take the one closest to the majority in ``hamming`` distance; the label is then that
    verification's and not the majority's.

    ``require_consistent_verdict`` of a step-consistent target: Yes is accepted only when every step
    is correct, and of the verifications that match the steps the target is one with the final
    verdict most of them have. Stage III's reward is that last line, so a target that marks an error
    and still says Yes would teach the reward model the loophole a policy looks for. The converse is
    accepted: steps can all be right and the answer wrong, as when a solution stops early. (A vote
    on the last line over *all* verifications would be worse: of verifiers that are right on each of
    four steps with probability 0.8 most report some error, and No would win on right solutions.
    That is the weakness of outcome consistency.) False: the last line is not looked at. A merged
    text is held to the same rule, whatever verification it is made of: the merge is told to make
    its last line agree.

    ``reference_pick`` of reference-guided labels. The paper does not say how one of the
    verifications is chosen. The default ``step_consistency`` is what the best reference-free method
    does, so the two differ in nothing but the answer in the prompt, and their distance is what the
    answer is worth.
    """

    ties: str = "drop"
    no_match: str = "drop"
    require_consistent_verdict: bool = True
    reference_pick: str = "step_consistency"

    def __post_init__(self) -> None:
        if self.ties not in ("drop", "incorrect"):
            raise ValueError(f"LabelOptions.ties={self.ties!r}: choose drop or incorrect")
        if self.no_match not in ("drop", "hamming"):
            raise ValueError(f"LabelOptions.no_match={self.no_match!r}: choose drop or hamming")
        if self.reference_pick not in PICKS:
            raise ValueError(
                f"LabelOptions.reference_pick={self.reference_pick!r}: choose one of {', '.join(PICKS)}"
            )

    @classmethod
    def of(cls, labels: LabelsConfig) -> LabelOptions:
        """The options a configuration asks for."""
        return cls(
            labels.ties,
            labels.no_match,
            labels.require_consistent_verdict,
            labels.reference_pick or "step_consistency",
        )


@dataclass(frozen=True, slots=True)
class Dropped:
    """A solution that got no label. ``reason`` is a metric key: ``tie``, ``no_match``,
    ``vote_0_truncated``, ...
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Pick:
    """The verification chosen among ``matching`` equally good ones, by the rule of
    ``LabelEvidence.chosen_by``.
    """

    verification: Verification
    count: VoteCount
    matching: int
    rule: str


Picker = Callable[[Solution, Sequence[Verification], int, "LabelOptions"], "Pick | Dropped"]


def pick_single(
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int,
    options: LabelOptions,
) -> Pick | Dropped:
    """Method 1: vote 0.

    When vote 0 is a failure the solution is dropped although later votes may be usable. This method
    stands for a budget of N = 1: taking the first vote that parses would give it up to N attempts,
    and would keep solutions that are hard to verify on the strength of a rare verification, which
    is what it is compared against.
    """
    first = next((v for v in verifications if v.vote == 0), None)
    if first is None:
        return Dropped("vote_0_missing")
    if not isinstance(first.outcome, Verdict):
        return Dropped(f"vote_0_{outcome_kind(first.outcome)}")
    return Pick(first, count_votes([first.outcome]), 1, "first_vote")


def pick_outcome_consistency(
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int,
    options: LabelOptions,
) -> Pick | Dropped:
    """Method 2: a random whole verification among those whose final verdict is the majority's."""
    count = count_votes(v.outcome for v in verifications)
    if count.num_votes == 0:
        return Dropped("no_votes")
    verdict = _resolve(majority(count.yes_votes, count.num_votes), options)
    if verdict is None:
        return Dropped("tie")
    matching = [v for v in _voters(verifications) if v.outcome.answer_correct == verdict]
    return Pick(
        _choose("outcome_consistency", solution, matching, seed),
        count,
        len(matching),
        "verdict_majority",
    )


def pick_step_consistency(
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int,
    options: LabelOptions,
) -> Pick | Dropped:
    """Method 3: a random whole verification among those that agree with the majority on every
    single step.

    The paper does not say whether the final verdict must agree with the steps;
    ``LabelOptions.require_consistent_verdict`` does. ``matching`` counts the verifications chosen from, 0 when
    ``no_match=hamming`` had to step in.
    """
    count = count_votes(v.outcome for v in verifications)
    if count.num_votes == 0:
        return Dropped("no_votes")
    target = tuple(
        _resolve(majority(votes, count.num_votes), options) for votes in count.correct_votes
    )
    if None in target:
        return Dropped("tie")
    voters = _voters(verifications)
    closest = min(_distance(v, target) for v in voters)
    if closest > 0 and options.no_match == "drop":
        return Dropped("no_match")
    candidates = [v for v in voters if _distance(v, target) == closest]
    if options.require_consistent_verdict:
        candidates = [v for v in candidates if is_coherent(v.outcome)]
        if not candidates:
            return Dropped("incoherent")
        verdict = _resolve(
            majority(sum(v.outcome.answer_correct for v in candidates), len(candidates)), options
        )
        if verdict is None:
            return Dropped("tie")
        candidates = [v for v in candidates if v.outcome.answer_correct == verdict]
    chosen = _choose("step_consistency", solution, candidates, seed)
    if closest:
        return Pick(chosen, count, 0, "closest_to_step_majority")
    return Pick(chosen, count, len(candidates), "step_majority")


PICKS: dict[str, Picker] = {
    "single": pick_single,
    "outcome_consistency": pick_outcome_consistency,
    "step_consistency": pick_step_consistency,
}
"""By the names of ``config.VOTE_METHODS``."""
DEFAULT_OPTIONS = LabelOptions()


def is_coherent(verdict: Verdict) -> bool:
    """False when a verdict marks an error and says Yes nevertheless."""
    return all(verdict.step_labels) or not verdict.answer_correct


def _voters(verifications: Sequence[Verification]) -> list[Verification]:
    return sorted(
        (v for v in verifications if isinstance(v.outcome, Verdict)), key=lambda v: v.vote
    )


def _distance(verification: Verification, target: tuple[bool, ...]) -> int:
    """Number of steps on which a verdict differs from the target."""
    return sum(said != wanted for said, wanted in zip(verification.outcome.step_labels, target))


def _resolve(decision: bool | None, options: LabelOptions) -> bool | None:
    return False if decision is None and options.ties == "incorrect" else decision


def _choose(
    pick: str, solution: Solution, candidates: list[Verification], seed: int
) -> Verification:
    return random.Random(derive_seed("label", pick, solution.key, seed)).choice(candidates)
