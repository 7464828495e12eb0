"""Judge of rollouts: gate the format, query the reward model, retry failed verifications."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from spark_nemo.config.hacking import ConstraintsConfig
from spark_nemo.engines.async_utils import all_or_none
from spark_nemo.grammar import canonical_solution
from spark_nemo.records import (
    AnswerVerdict,
    EngineError,
    Failure,
    FormatViolation,
    Rollout,
    RolloutVerdict,
    VariantOutcome,
    Verdict,
    count_votes,
    derive_seed,
    majority,
    outcome_kind,
)

from .hacking.constraints import read_response
from .prm_service import Answer, Case, PRMService


@dataclass(frozen=True, slots=True)
class RewardJudge:
    """Judge of rollouts by the verifications of a ``PRMService``.

    Every rollout gets ``votes`` verifications, of which at least ``min_votes`` must give a verdict.
    A verification without a verdict is retried up to ``retries`` times, with a fresh seed.
    """

    service: PRMService
    retries: int
    votes: int = 1
    min_votes: int = 1
    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)

    async def judge(self, rollout: Rollout) -> RolloutVerdict:
        """Check the format, then verify the canonical text of the steps."""
        parsed = read_response(rollout, self.constraints)
        if isinstance(parsed, FormatViolation):
            return RolloutVerdict(parsed, None)
        case = self.service.case(
            rollout.problem.question, canonical_solution(parsed), len(parsed.steps)
        )
        answers = await all_or_none(self._vote(rollout, case, vote) for vote in range(self.votes))
        outcome = aggregate_votes([answer.outcome for answer in answers], self.min_votes)
        return RolloutVerdict(None, outcome, sum(answer.num_tokens for answer in answers))

    async def _vote(self, rollout: Rollout, case: Case, vote: int) -> Answer:
        outcome: VariantOutcome = EngineError("never asked")
        num_tokens = 0
        for attempt in range(self.retries + 1):
            answer = await self.service.verify(case, vote_seed(rollout, attempt, vote))
            outcome = answer.outcome
            num_tokens += answer.num_tokens
            # A greedy attempt would fail the same way again, unless the engine itself failed.
            repeats = self.service.sampling.temperature == 0 and not isinstance(
                outcome, EngineError
            )
            if not isinstance(outcome, Failure) or repeats:
                break
        return Answer(outcome, num_tokens)


def vote_seed(rollout: Rollout, attempt: int, vote: int) -> int:
    """Return the seed of one attempt at one vote.

    The first vote has the seed of a judge with one vote, so that further votes only add to it.
    """
    parts = ("judge", rollout.problem.problem_id, rollout.text, attempt)
    return derive_seed(*parts) if vote == 0 else derive_seed(*parts, vote)


def aggregate_votes(outcomes: Sequence[VariantOutcome], min_votes: int) -> VariantOutcome:
    """Return the majority's label of every step and the majority's verdict on one response.

    ``outcomes`` are its votes, in order. An ORM's votes give a verdict without step labels.

    Only verdicts vote. With fewer than ``min_votes`` verdicts the result is the first failure of
    the most common kind, never a verdict. A single outcome is returned unchanged if ``min_votes``
    is 1.

    A tie is *incorrect*, and *No*. The policy is optimised against this reward: a false No costs
    some signal, but the policy learns to provoke a false Yes.

    The verdict is counted separately, not derived from the labels. A verification may end in No
    although it calls every step correct (a right path to another question).

    Raises ``ValueError`` without outcomes, if ``min_votes`` is not in 1..len(outcomes), or if
    verdicts disagree on the number of steps or on having any.
    """
    if not 1 <= min_votes <= len(outcomes):
        raise ValueError(
            f"min_votes={min_votes}: must lie in 1..{len(outcomes)}, the number of votes"
        )
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if len(outcomes) - len(failures) < min_votes:
        ((kind, _),) = Counter(map(outcome_kind, failures)).most_common(1)
        return next(outcome for outcome in failures if outcome_kind(outcome) == kind)
    answers = [outcome.answer_correct for outcome in outcomes if isinstance(outcome, AnswerVerdict)]
    if answers and len(answers) + len(failures) == len(outcomes):
        return AnswerVerdict(majority(sum(answers), len(answers)) is True)
    count = count_votes(outcomes)
    labels = tuple(majority(votes, count.num_votes) is True for votes in count.correct_votes)
    return Verdict(labels, majority(count.yes_votes, count.num_votes) is True)
