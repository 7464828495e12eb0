"""Several verifications of one response as one outcome: test-time scaling of the reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from spark_nemo.records import (
    AnswerVerdict,
    Failure,
    VariantOutcome,
    Verdict,
    count_votes,
    majority,
    outcome_kind,
)


def aggregate_votes(outcomes: Sequence[VariantOutcome], min_votes: int) -> VariantOutcome:
    """Step by step the majority's label, and the majority's verdict; ``outcomes`` are votes on one
    response, in order. Of an ORM's votes, which label no steps, the majority's verdict alone.

    Only verdicts vote. With fewer than ``min_votes`` of them the result is a failure of the
    commonest kind (the first one seen of it), never a verdict. One outcome is returned as it is
    when ``min_votes`` is 1.

    A tie is *incorrect*, and *No*: the policy is optimised against this reward, so a response that
    half of the votes reject must not be paid like one that none rejects. A false No costs some
    signal; a false Yes is what a policy learns to provoke.

    The verdict is counted on its own, not derived from the labels: a single verification may say No
    about steps that it calls correct (a right path to another question), and so may the majority.

    Raises ``ValueError`` without outcomes, when ``min_votes`` is not in 1..len(outcomes), or when
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
