"""Vote counts. Only a ``Verdict`` votes; failures are counted by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .verdict import AnswerVerdict, Outcome, Verdict, outcome_kind


@dataclass(frozen=True, slots=True)
class VoteCount:
    """The votes on one solution.

    ``correct_votes[k]`` of ``num_votes`` verdicts judged step ``k + 1`` correct, and ``yes_votes``
    of them end in Yes. ``failures`` counts the other outcomes by ``outcome_kind``.
    """

    correct_votes: tuple[int, ...]
    num_votes: int
    yes_votes: int
    failures: Mapping[str, int]


def count_votes(outcomes: Iterable[Outcome]) -> VoteCount:
    """Count the verdicts and the failures among the outcomes of one solution.

    Raises ``ValueError`` for an ORM's verdict, which has no step labels, and for verdicts with
    different numbers of steps. The parser rejects a verification that does not cover the solution's
    steps, so such verdicts belong to different solutions.
    """
    outcomes = list(outcomes)
    if any(isinstance(outcome, AnswerVerdict) for outcome in outcomes):
        raise ValueError("an ORM's verdict has no step labels and cannot vote on steps")
    verdicts = [outcome for outcome in outcomes if isinstance(outcome, Verdict)]
    lengths = {len(verdict.step_labels) for verdict in verdicts}
    if len(lengths) > 1:
        raise ValueError(f"verdicts with {sorted(lengths)} steps cannot be votes on one solution")
    return VoteCount(
        correct_votes=tuple(
            sum(votes) for votes in zip(*(verdict.step_labels for verdict in verdicts))
        ),
        num_votes=len(verdicts),
        yes_votes=sum(verdict.answer_correct for verdict in verdicts),
        failures=dict(Counter(outcome_kind(o) for o in outcomes if not isinstance(o, Verdict))),
    )


def majority(votes: int, num_votes: int) -> bool | None:
    """True if more than half of ``num_votes`` are in favour; None on a tie, or without votes."""
    if not 0 <= votes <= num_votes:
        raise ValueError(f"{votes} votes of {num_votes}: must be between 0 and the number of votes")
    if 2 * votes == num_votes:
        return None
    return 2 * votes > num_votes
