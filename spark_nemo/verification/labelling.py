"""The three reference-free labelling methods (SPARK, arXiv 2512.03244, section 3.1, methods 1 to 3).

Each method reads the verifications of one solution and returns one whole verification as training target, never a
splice of several, or ``Dropped`` with the reason. A label always says what its target text says: ``step_labels`` and
``answer_correct`` are those of the chosen verification, so that nobody trains on a text that contradicts its label.

The random choice among equally good verifications depends on the seed, the method and the solution's key alone: not on
the order of the list, on other solutions, or on how the work was sharded.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spark_nemo.records import (
    LabelEvidence,
    LabelledSolution,
    Solution,
    Verdict,
    Verification,
    derive_seed,
    outcome_kind,
)

from .voting import VoteCount, count_votes, majority


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """What the paper leaves open. The defaults drop a solution whenever its label would be doubtful.

    ``ties``: ``drop`` the solution, or count a tied step (or final verdict) as ``incorrect``.

    ``no_match``: when no verification agrees with every step's majority, ``drop`` the solution, or take the one
    closest to the majority in ``hamming`` distance; the label is then that verification's and not the majority's.

    ``final_verdict`` of a step-consistent target. ``agreed``: Yes is accepted only when every step is correct, and of
    the verifications that match the steps the target is one with the final verdict most of them have. Stage III's
    reward is that last line, so a target that marks an error and still says Yes would teach the reward model the
    loophole a policy looks for. The converse is accepted: steps can all be right and the answer wrong, as when a
    solution stops early. (A vote on the last line over *all* verifications would be worse: of verifiers that are right
    on each of four steps with probability 0.8 most report some error, and No would win on right solutions. That is
    the weakness of outcome consistency.) ``any``: the last line is not looked at.
    """

    ties: str = "drop"
    no_match: str = "drop"
    final_verdict: str = "agreed"

    def __post_init__(self) -> None:
        if self.ties not in ("drop", "incorrect"):
            raise ValueError(f"LabelOptions.ties={self.ties!r}: choose drop or incorrect")
        if self.no_match not in ("drop", "hamming"):
            raise ValueError(f"LabelOptions.no_match={self.no_match!r}: choose drop or hamming")
        if self.final_verdict not in ("agreed", "any"):
            raise ValueError(f"LabelOptions.final_verdict={self.final_verdict!r}: choose agreed or any")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A solution that got no label. ``reason`` is a metric key: ``tie``, ``no_match``, ``vote_0_truncated``, ..."""

    reason: str


Label = LabelledSolution | Dropped
Method = Callable[[Solution, Sequence[Verification], int, LabelOptions], Label]


def label_single(
    solution: Solution, verifications: Sequence[Verification], seed: int = 0, options: LabelOptions = LabelOptions(),
) -> Label:
    """Method 1: what one verification says (vote 0), whole.

    When vote 0 is a failure the solution is dropped although later votes may be usable. This method stands for a
    budget of N = 1: taking the first vote that parses would give it up to N attempts, and would keep solutions that
    are hard to verify on the strength of a rare verification, which is what it is compared against.
    """
    first = next((v for v in verifications if v.vote == 0), None)
    if first is None:
        return Dropped("vote_0_missing")
    if not isinstance(first.outcome, Verdict):
        return Dropped(f"vote_0_{outcome_kind(first.outcome)}")
    return _labelled("single", solution, first, count_votes([first.outcome]), matching=1)


def label_outcome_consistency(
    solution: Solution, verifications: Sequence[Verification], seed: int = 0, options: LabelOptions = LabelOptions(),
) -> Label:
    """Method 2: a random whole verification among those whose final verdict is the majority's."""
    count = count_votes(v.outcome for v in verifications)
    if count.num_votes == 0:
        return Dropped("no_votes")
    verdict = _resolve(majority(count.yes_votes, count.num_votes), options)
    if verdict is None:
        return Dropped("tie")
    matching = [v for v in _voters(verifications) if v.outcome.answer_correct == verdict]
    chosen = _choose("outcome_consistency", solution, matching, seed)
    return _labelled("outcome_consistency", solution, chosen, count, len(matching))


def label_step_consistency(
    solution: Solution, verifications: Sequence[Verification], seed: int = 0, options: LabelOptions = LabelOptions(),
) -> Label:
    """Method 3: a random whole verification among those that agree with the majority on every single step.

    The paper does not say whether the final verdict must agree with the steps; ``LabelOptions.final_verdict`` does.
    ``evidence.matching_votes`` counts the verifications chosen from, 0 when ``no_match=hamming`` had to step in.
    """
    count = count_votes(v.outcome for v in verifications)
    if count.num_votes == 0:
        return Dropped("no_votes")
    target = tuple(_resolve(majority(votes, count.num_votes), options) for votes in count.correct_votes)
    if None in target:
        return Dropped("tie")
    voters = _voters(verifications)
    closest = min(_distance(v, target) for v in voters)
    if closest > 0 and options.no_match == "drop":
        return Dropped("no_match")
    candidates = [v for v in voters if _distance(v, target) == closest]
    if options.final_verdict == "agreed":
        candidates = [v for v in candidates if all(v.outcome.step_labels) or not v.outcome.answer_correct]
        if not candidates:
            return Dropped("incoherent")
        verdict = _resolve(majority(sum(v.outcome.answer_correct for v in candidates), len(candidates)), options)
        if verdict is None:
            return Dropped("tie")
        candidates = [v for v in candidates if v.outcome.answer_correct == verdict]
    chosen = _choose("step_consistency", solution, candidates, seed)
    return _labelled("step_consistency", solution, chosen, count, 0 if closest else len(candidates))


LABEL_METHODS: dict[str, Method] = {
    "single": label_single,
    "outcome_consistency": label_outcome_consistency,
    "step_consistency": label_step_consistency,
}
"""By the names of ``config.LABEL_METHODS``."""


def label_all(
    method: str, solutions: Iterable[Solution], verifications: Iterable[Verification], seed: int,
    options: LabelOptions = LabelOptions(),
) -> tuple[list[LabelledSolution], dict[str, int]]:
    """Label every solution, in their order, and count the dropped ones by reason.

    Labelled plus dropped is the number of solutions. Raises ``ValueError`` for an unknown method, a verification of no
    given solution, a solution given twice, and two verifications of one solution with the same vote number.
    """
    if method not in LABEL_METHODS:
        raise ValueError(f"label method {method!r}: choose one of {', '.join(LABEL_METHODS)}")
    solutions = list(solutions)
    votes: dict[str, list[Verification]] = {solution.key: [] for solution in solutions}
    if len(votes) != len(solutions):
        raise ValueError(f"{len(solutions) - len(votes)} solutions were given twice: their keys must differ")
    for verification in verifications:
        if verification.solution_key not in votes:
            raise ValueError(f"verification {verification.key} is of solution {verification.solution_key}, not given")
        votes[verification.solution_key].append(verification)
    labelled: list[LabelledSolution] = []
    dropped: Counter[str] = Counter()
    for solution in solutions:
        numbers = [v.vote for v in votes[solution.key]]
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"solution {solution.key}: two verifications with the same vote number in {numbers}")
        label = LABEL_METHODS[method](solution, votes[solution.key], seed, options)
        if isinstance(label, Dropped):
            dropped[label.reason] += 1
        else:
            labelled.append(label)
    return labelled, dict(dropped)


def _voters(verifications: Sequence[Verification]) -> list[Verification]:
    return sorted((v for v in verifications if isinstance(v.outcome, Verdict)), key=lambda v: v.vote)


def _distance(verification: Verification, target: tuple[bool, ...]) -> int:
    """Number of steps on which a verdict differs from the target."""
    return sum(said != wanted for said, wanted in zip(verification.outcome.step_labels, target))


def _resolve(decision: bool | None, options: LabelOptions) -> bool | None:
    return False if decision is None and options.ties == "incorrect" else decision


def _choose(method: str, solution: Solution, candidates: list[Verification], seed: int) -> Verification:
    return random.Random(derive_seed("label", method, solution.key, seed)).choice(candidates)


def _labelled(
    method: str, solution: Solution, chosen: Verification, count: VoteCount, matching: int,
) -> LabelledSolution:
    assert isinstance(chosen.outcome, Verdict)
    return LabelledSolution(
        method=method,
        solution=solution,
        step_labels=chosen.outcome.step_labels,
        answer_correct=chosen.outcome.answer_correct,
        target_text=chosen.text,
        evidence=LabelEvidence(
            correct_votes=count.correct_votes, num_votes=count.num_votes, yes_votes=count.yes_votes,
            chosen_vote=chosen.vote, matching_votes=matching),
    )
