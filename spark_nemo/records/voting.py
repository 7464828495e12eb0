"""Counting votes. Only a ``Verdict`` votes; every other outcome is counted under its own name and
never as a vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .verdict import AnswerVerdict, Outcome, Verdict, outcome_kind


@dataclass(frozen=True, slots=True)
class VoteCount:
    """The votes on one solution.

    ``correct_votes[k]`` of ``num_votes`` verdicts judged step ``k + 1`` correct, ``yes_votes`` of
    them said Yes at the end; ``failures`` counts the outcomes that did not vote, by
    ``outcome_kind``.
    """

    correct_votes: tuple[int, ...]
    num_votes: int
    yes_votes: int
    failures: Mapping[str, int]


def count_votes(outcomes: Iterable[Outcome]) -> VoteCount:
    """Count the verdicts and the failures among the outcomes of one solution.

    Raises ``ValueError`` for an ORM's verdict, which labels no steps, and when two verdicts have
    different numbers of steps: the parser turns a verification that does not cover the solution's
    steps into a ``ParseFailure``, so verdicts of one solution that disagree on the number of steps
    belong to different solutions, and adding them up step by step would mean nothing.
    """
    outcomes = list(outcomes)
    if any(isinstance(outcome, AnswerVerdict) for outcome in outcomes):
        raise ValueError("an ORM's verdict was given as a vote on steps: it labels none")
    verdicts = [outcome for outcome in outcomes if isinstance(outcome, Verdict)]
    lengths = {len(verdict.step_labels) for verdict in verdicts}
    if len(lengths) > 1:
        raise ValueError(
            f"verdicts with {sorted(lengths)} steps were given as votes on one solution"
        )
    return VoteCount(
        correct_votes=tuple(
            sum(votes) for votes in zip(*(verdict.step_labels for verdict in verdicts))
        ),
        num_votes=len(verdicts),
        yes_votes=sum(verdict.answer_correct for verdict in verdicts),
        failures=dict(Counter(outcome_kind(o) for o in outcomes if not isinstance(o, Verdict))),
    )


def majority(votes: int, num_votes: int) -> bool | None:
    """Whether more than half of ``num_votes`` are in favour; None on a tie (an empty vote is a
    tie).
    """
    if not 0 <= votes <= num_votes:
        raise ValueError(
            f"{votes} votes of {num_votes}: must lie between 0 and the number of votes"
        )
    return None if 2 * votes == num_votes else 2 * votes > num_votes
