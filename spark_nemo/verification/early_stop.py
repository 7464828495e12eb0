"""When to stop asking for votes on a solution: pure functions of the votes so far, in the order of
their numbers.

Which votes are taken therefore depends on votes ``0..k`` of that solution alone: not on timing, on
other solutions, or on how the work was sharded. A run that is resumed, resharded or grown to more
votes takes the same decisions again.

What must be settled is each step's majority among the verdicts of all ``N`` votes: correct,
incorrect, or a tie, which the labelling methods treat as an outcome of its own. A vote that failed
is no vote, and so may those still to come be.

``exact``
    With ``c`` votes for and ``w`` against, and ``r`` votes left, no continuation changes the majority when
    ``|c - w| > r``: the votes left move the lead by at most ``r``, and a lead that cannot reach zero can neither turn
    nor become a tie. While ``|c - w| <= r``, ``|c - w|`` votes against the leader make a tie, so the rule stops as
    early as any exact rule can.

``sequential``
    Stops when, for every step, the probability that all ``N`` votes would have another majority is at most ``error``:
    the predictive probability of Bayesian sequential designs (Lee and Liu 2008, "A predictive probability design for
    phase II cancer clinical trials", Clinical Trials 5:93), here with the prior ``Beta(1/2, 1/2)`` (Jeffreys) on the
    share ``p`` of verifications that call the step correct. Then ``c + w`` votes leave ``p ~ Beta(c + 1/2, w + 1/2)``,
    and the number ``X`` of the ``r`` votes left that say correct is beta-binomial::

        P(X = x) = C(r, x) B(c + 1/2 + x, w + 1/2 + r - x) / B(c + 1/2, w + 1/2)

    The prior is fixed and not fitted to the run, for a fitted one would make decisions depend on what else was sampled
    before. It treats both labels alike, and puts its mass near 0 and 1 because verifiers mostly agree with themselves.
    The votes left are counted as verdicts; failures among them leave less to change the majority with. ``error`` is a
    probability per step at the moment of stopping, averaged over the prior: for a step that divides the verifier
    evenly it is exceeded (the majority of any N votes is then an accident), for the usual lopsided step undercut.

The final Yes/No is not settled by default. Step consistency, the method that works best, takes its
target from the steps' majorities, and verifiers of a long solution rarely agree on the last line:
on the small world waiting for it too brings the exact rule's saving from 25 % of the tokens to 20
%. Outcome consistency rests on that line alone; ``stage1.early_stop_verdict`` is for it. Either way
only majorities are the same as with N votes: the target is chosen among the verifications there
are, so it may be another one, and with fewer there may be none that matches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from spark_nemo.config import Stage1Config
from spark_nemo.records import Outcome

from .voting import count_votes

_PRIOR = 0.5


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """How many votes to ask for next. ``num_votes`` is N; ``error`` is the sequential test's, None
    for the exact rule.

    ``vote_batch_size`` is the least number of votes asked for at once. More than 1 spares rounds and
    costs votes: those in a wave behind the one that decided. A wave is longer than that wherever
    fewer votes cannot decide whatever they say, so even ``vote_batch_size=1`` takes no more rounds than
    it must.

    ``with_verdict``: the majority of the final Yes/No must be settled too, on which outcome
    consistency rests.
    """

    num_votes: int
    error: float | None = None
    vote_batch_size: int = 1
    with_verdict: bool = False

    def __post_init__(self) -> None:
        if self.num_votes < 1 or self.vote_batch_size < 1:
            raise ValueError(
                f"StoppingRule num_votes={self.num_votes}, vote_batch_size={self.vote_batch_size}: at least 1 each"
            )
        if self.error is not None and not 0 < self.error < 0.5:
            raise ValueError(f"StoppingRule.error={self.error}: must lie between 0 and 0.5")

    def next_wave(self, outcomes: Sequence[Outcome]) -> int:
        """How many votes to ask for after these, which are votes 0, 1, ... of a solution; 0 when it
        is decided.
        """
        remaining = self.num_votes - len(outcomes)
        if remaining <= 0:
            return 0
        questions = self._questions(outcomes)
        needed = next(
            more
            for more in range(remaining + 1)
            if all(
                self._decided(*_with_leader(*question, more), remaining - more)
                for question in questions
            )
        )
        return min(remaining, max(needed, self.vote_batch_size)) if needed else 0

    def _questions(self, outcomes: Sequence[Outcome]) -> list[tuple[int, int]]:
        """Votes (for, against) of every majority that has to be settled, each once."""
        count = count_votes(outcomes)
        votes_for = [*count.correct_votes, *([count.yes_votes] if self.with_verdict else [])]
        return list({(votes, count.num_votes - votes) for votes in votes_for}) or [(0, 0)]

    def _decided(self, votes_for: int, votes_against: int, remaining: int) -> bool:
        if is_settled(votes_for, votes_against, remaining):
            return True
        return (
            self.error is not None
            and change_probability(votes_for, votes_against, remaining) <= self.error
        )


def stopping_rule(config: Stage1Config) -> StoppingRule | None:
    """The configured rule; None when every vote is asked for."""
    if config.early_stop == "none":
        return None
    return StoppingRule(
        config.verifications_per_solution,
        config.early_stop_error,
        config.vote_batch_size or 1,
        config.early_stop_verdict,
    )


def votes_taken(rule: StoppingRule, outcomes: Sequence[Outcome]) -> int:
    """How many of ``outcomes``, which are all ``rule.num_votes`` votes of a solution, the rule
    would have asked for.
    """
    taken = 0
    while wave := rule.next_wave(outcomes[:taken]):
        taken += wave
    return taken


def is_settled(votes_for: int, votes_against: int, remaining: int) -> bool:
    """Whether no ``remaining`` votes (for, against or failed) can change the majority, ties counted
    as one.
    """
    return remaining == 0 or abs(votes_for - votes_against) > remaining


@lru_cache(maxsize=1 << 16)
def change_probability(votes_for: int, votes_against: int, remaining: int) -> float:
    """Predictive probability that ``remaining`` more verdicts end in another majority than the
    present one.

    Beta-binomial under the prior of the module's docstring; a tie is a majority of its own.
    """
    now, alpha, beta = _sign(votes_for - votes_against), votes_for + _PRIOR, votes_against + _PRIOR
    return math.fsum(
        math.comb(remaining, x)
        * math.exp(_log_beta(alpha + x, beta + remaining - x) - _log_beta(alpha, beta))
        for x in range(remaining + 1)
        if _sign(votes_for + x - votes_against - (remaining - x)) != now
    )


def _with_leader(votes_for: int, votes_against: int, more: int) -> tuple[int, int]:
    """The votes after ``more`` that agree with the leader: nothing decides sooner."""
    if votes_for >= votes_against:
        return votes_for + more, votes_against
    return votes_for, votes_against + more


def _log_beta(alpha: float, beta: float) -> float:
    return math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
