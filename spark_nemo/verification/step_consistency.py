"""Step consistency, method 3 of SPARK (arXiv 2512.03244, section 3.1): the paper's best labels.

With N verdicts on a solution of K steps, where v[n][k] is True if verdict n calls step k correct,
the target of step k is the majority of the votes on it::

    target[k] = sum(v[n][k] for n) > N / 2          a tie: labels.ties

The label is one whole verification, drawn at random among those with ``v[n] == target``. If there
is none, ``labels.no_match`` drops the solution or takes the verification with the smallest Hamming
distance to the target.

The paper does not say whether the final Yes/No must agree with the steps. By default
(``labels.require_consistent_verdict``), Yes is accepted only if every step is correct. Stage III's
reward is that last line: a target that marks an error and still says Yes would teach the reward
model the loophole that a policy looks for. No with all steps correct is accepted, because a
solution can stop early. Among the matching verifications, the majority of their own final verdicts
decides. (Voting on the last line over *all* verifications would be worse: verifiers that are right
on each of four steps with probability 0.8 mostly report some error, and No would win on correct
solutions. This is the weakness of outcome consistency.)
"""

from __future__ import annotations

from spark_nemo.records import Verdict, Verification, count_votes, majority

from .vote_choice import Dropped, LabelInputs, VoteChoice, draw, resolve_tie, votes_with_verdict


def choose_step_consistency(inputs: LabelInputs) -> VoteChoice | Dropped:
    """Choose a random verification among those that agree with the majority on every step.

    ``matching`` is the number of such verifications, 0 if ``no_match=hamming`` was needed.
    """
    count = count_votes(v.outcome for v in inputs.verifications)
    if count.num_votes == 0:
        return Dropped("no_votes")
    target = tuple(
        resolve_tie(majority(votes, count.num_votes), inputs.labels)
        for votes in count.correct_votes
    )
    if None in target:
        return Dropped("tie")

    votes = votes_with_verdict(inputs)
    smallest = min(_hamming_distance(vote, target) for vote in votes)
    if smallest > 0 and inputs.labels.no_match == "drop":
        return Dropped("no_match")
    candidates = [vote for vote in votes if _hamming_distance(vote, target) == smallest]

    if inputs.labels.require_consistent_verdict:
        candidates = [vote for vote in candidates if is_coherent(vote.outcome)]
        if not candidates:
            return Dropped("incoherent")
        yes_votes = sum(vote.outcome.answer_correct for vote in candidates)
        verdict = resolve_tie(majority(yes_votes, len(candidates)), inputs.labels)
        if verdict is None:
            return Dropped("tie")
        candidates = [vote for vote in candidates if vote.outcome.answer_correct == verdict]

    chosen = draw("step_consistency", inputs, candidates)
    if smallest > 0:
        return VoteChoice(chosen, count, 0, "closest_to_step_majority")
    return VoteChoice(chosen, count, len(candidates), "step_majority")


def is_coherent(verdict: Verdict) -> bool:
    """False if a verdict marks an error and still says Yes."""
    return all(verdict.step_labels) or not verdict.answer_correct


def _hamming_distance(verification: Verification, target: tuple[bool, ...]) -> int:
    """Number of steps on which a verification differs from the target."""
    return sum(label != wanted for label, wanted in zip(verification.outcome.step_labels, target))
