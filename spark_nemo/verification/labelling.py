"""From the verifications of one solution to its label (SPARK, arXiv 2512.03244, section 3.1,
methods 1 to 6).

A label always says what its target text says: ``step_labels`` and ``answer_correct`` are those of
the chosen verification, or of the merge made from it, so that nobody trains on a text that
contradicts its label.

Methods 1 to 3 take a picked verification whole. Meta-critique and the two hybrids take the merge of
a picked verification and its critique; a merge that cannot be read drops the solution, for falling
back on the unrevised text would mix two methods under one name. Reference-guided labels are a
declared baseline: they read verifications whose prompt held the answer, which are of a type of
their own, and every other method refuses that type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS, VOTE_METHODS
from spark_nemo.grammar.verification import after_thinking
from spark_nemo.records import (
    Critique,
    LabelEvidence,
    LabelledSolution,
    ParseFailure,
    ReferenceVerification,
    Revision,
    Solution,
    Verdict,
    Verification,
    outcome_kind,
)

from .vote_choice import DEFAULT_OPTIONS, PICKS, Dropped, LabelOptions, Pick, is_coherent

Revisions = Mapping[str, Revision]
"""Critique and merge by the key of the verification they are about."""
NO_REVISIONS: Revisions = {}
Label = LabelledSolution | Dropped
Method = Callable[..., Label]


def label_all(
    method: str,
    solutions: Iterable[Solution],
    verifications: Iterable[Verification],
    seed: int,
    options: LabelOptions = DEFAULT_OPTIONS,
    revisions: Revisions = NO_REVISIONS,
) -> tuple[list[LabelledSolution], dict[str, int]]:
    """Label every solution, in their order, and count the dropped ones by reason.

    Labelled plus dropped is the number of solutions. ``revisions`` are read by meta-critique and
    the hybrids only. Raises ``ValueError`` for an unknown method, a verification of no given
    solution, a solution given twice, two verifications of one solution with the same vote number,
    and verifications of the wrong type for the method.
    """
    if method not in LABEL_METHODS:
        raise ValueError(f"label method {method!r}: choose one of {', '.join(LABEL_METHODS)}")
    solutions = list(solutions)
    votes: dict[str, list[Verification]] = {solution.key: [] for solution in solutions}
    if len(votes) != len(solutions):
        raise ValueError(
            f"{len(solutions) - len(votes)} solutions were given twice: their keys must differ"
        )
    for verification in verifications:
        if verification.solution_key not in votes:
            raise ValueError(
                f"verification {verification.key} is of solution {verification.solution_key}, not given"
            )
        votes[verification.solution_key].append(verification)
    labelled: list[LabelledSolution] = []
    dropped: Counter[str] = Counter()
    for solution in solutions:
        numbers = [v.vote for v in votes[solution.key]]
        if len(set(numbers)) != len(numbers):
            raise ValueError(
                f"solution {solution.key}: two verifications with the same vote number in {numbers}"
            )
        label = LABEL_METHODS[method](solution, votes[solution.key], seed, options, revisions)
        if isinstance(label, Dropped):
            dropped[label.reason] += 1
        else:
            labelled.append(label)
    return labelled, dict(dropped)


def pick_verification(
    pick: str,
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int,
    options: LabelOptions,
) -> Pick | Dropped:
    """The verification that a reference-free way of picking chooses. Raises ``ValueError`` when one
    saw the answer.
    """
    if any(isinstance(v, ReferenceVerification) for v in verifications):
        raise ValueError(
            f"{pick}: solution {solution.key} came with verifications that saw the answer; only "
            f"{REFERENCE_GUIDED} may read those"
        )
    return PICKS[pick](solution, verifications, seed, options)


def critique_text(critique: Critique) -> str | Dropped:
    """What a critique says, without thinking; ``Dropped`` when it was cut off or says nothing."""
    if critique.finish_reason != "stop":
        return Dropped(
            "critique_truncated" if critique.finish_reason == "length" else "critique_engine_error"
        )
    text = after_thinking(critique.text)
    if isinstance(text, ParseFailure) or not text.strip():
        return Dropped("critique_parse_failure")
    return text.strip()


def _label_by_vote(
    method: str,
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int = 0,
    options: LabelOptions = DEFAULT_OPTIONS,
    revisions: Revisions = NO_REVISIONS,
) -> Label:
    """Methods 1 to 3: what the picked verification says, whole."""
    picked = pick_verification(method, solution, verifications, seed, options)
    return picked if isinstance(picked, Dropped) else _labelled(method, solution, picked)


def _label_by_merge(
    method: str,
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int = 0,
    options: LabelOptions = DEFAULT_OPTIONS,
    revisions: Revisions = NO_REVISIONS,
) -> Label:
    """Methods 4 and 5: what the merge of the picked verification and its critique says."""
    picked = pick_verification(REVISED_METHODS[method], solution, verifications, seed, options)
    if isinstance(picked, Dropped):
        return picked
    revision = revisions.get(picked.verification.key)
    if revision is None:
        return Dropped("critique_missing")
    if isinstance(fault := critique_text(revision.critique), Dropped):
        return fault
    if revision.merge is None:
        return Dropped("merge_missing")
    outcome = revision.merge.outcome
    if not isinstance(outcome, Verdict):
        return Dropped(f"merge_{outcome_kind(outcome)}")
    if len(outcome.step_labels) != len(picked.verification.outcome.step_labels):
        return Dropped("merge_step_count")
    if options.require_consistent_verdict and not is_coherent(outcome):
        return Dropped("merge_incoherent")
    return _labelled(method, solution, picked, revision)


def _label_reference_guided(
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int = 0,
    options: LabelOptions = DEFAULT_OPTIONS,
    revisions: Revisions = NO_REVISIONS,
) -> Label:
    """Method 6, a declared baseline: ``LabelOptions.reference_pick`` among verifications that saw
    the answer.

    Raises ``ValueError`` for a verification that did not see it: the two kinds must not be mixed.
    """
    if not all(isinstance(v, ReferenceVerification) for v in verifications):
        raise ValueError(
            f"{REFERENCE_GUIDED}: solution {solution.key} came with verifications that saw no answer"
        )
    picked = PICKS[options.reference_pick](solution, verifications, seed, options)
    return picked if isinstance(picked, Dropped) else _labelled(REFERENCE_GUIDED, solution, picked)


def _labelled(
    method: str, solution: Solution, picked: Pick, revision: Revision | None = None
) -> LabelledSolution:
    chosen, count = picked.verification, picked.count
    source = chosen if revision is None else revision.merge
    assert source is not None and isinstance(source.outcome, Verdict)
    return LabelledSolution(
        method=method,
        solution=solution,
        step_labels=source.outcome.step_labels,
        answer_correct=source.outcome.answer_correct,
        target_text=source.text,
        evidence=LabelEvidence(
            correct_votes=count.correct_votes,
            num_votes=count.num_votes,
            yes_votes=count.yes_votes,
            chosen_vote=chosen.vote,
            matching_votes=picked.matching,
            chosen_by=picked.rule,
            chosen_key=chosen.key,
            critique_key=revision.critique.key if revision is not None else None,
            merge_key=source.key if revision is not None else None,
        ),
    )


LABEL_METHODS: dict[str, Method] = {
    **{method: partial(_label_by_vote, method) for method in VOTE_METHODS},
    **{method: partial(_label_by_merge, method) for method in REVISED_METHODS},
    REFERENCE_GUIDED: _label_reference_guided,
}
"""By the names of ``config.LABEL_METHODS``; called with solution, verifications, seed, options and
revisions.

1 ``single``: vote 0. 2 ``outcome_consistency``: a random one among the verifications whose final
verdict is the majority's. 3 ``step_consistency``: a random one among those that agree with the
majority on every single step. 4 ``meta_critique``: the merge of vote 0 and its critique. 5
``hybrid_outcome``: method 4 on the verification that outcome consistency picks; ``hybrid_step``: on
the step-level pick, as the authors' scripts also have it. 6 ``reference_guided``.
"""
