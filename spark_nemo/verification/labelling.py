"""Label methods: from the verifications of one solution to its label, or a reason to drop it.

SPARK (arXiv 2512.03244), section 3.1, methods 1 to 6. A label always agrees with its target text:
``step_labels`` and ``answer_correct`` are those of the chosen verification, or of the merge made
from it. No answer or true step label is read here; ``spark_nemo.evaluation`` measures the labels.

The reference-guided baseline reads verifications whose prompt held the answer. They have a type of
their own, which every other method rejects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from spark_nemo.config import REFERENCE_GUIDED, REVISED_METHODS, LabelsConfig
from spark_nemo.grammar.verification import after_thinking
from spark_nemo.records import (
    Critique,
    LabelEvidence,
    LabelledSolution,
    Merge,
    MetaCritique,
    ParseFailure,
    ReferenceVerification,
    Solution,
    Verdict,
    Verification,
    outcome_kind,
)

from .step_consistency import choose_step_consistency, is_coherent
from .vote_choice import (
    Dropped,
    LabelInputs,
    VoteChoice,
    choose_outcome_consistency,
    choose_single,
)

Label = LabelledSolution | Dropped
LabelMethod = Callable[[LabelInputs], Label]

VOTE_CHOICES: dict[str, Callable[[LabelInputs], VoteChoice | Dropped]] = {
    "single": choose_single,
    "outcome_consistency": choose_outcome_consistency,
    "step_consistency": choose_step_consistency,
}
"""By the names of ``config.VOTE_METHODS``."""


def label_all(
    method: str,
    solutions: Iterable[Solution],
    verifications: Iterable[Verification],
    seed: int,
    labels: LabelsConfig | None = None,
    meta_critiques: Mapping[str, MetaCritique] | None = None,
) -> tuple[list[LabelledSolution], dict[str, int]]:
    """Label every solution, in their order, and count the dropped ones by reason.

    Raises ``ValueError`` for an unknown method, and for verifications that do not fit: of another
    solution, of the wrong type for the method, or with a vote number given twice.
    """
    if method not in LABEL_METHODS:
        raise ValueError(f"label method {method!r}: choose one of {', '.join(LABEL_METHODS)}")
    solutions = list(solutions)
    votes = _votes_by_solution(solutions, verifications)
    labelled: list[LabelledSolution] = []
    dropped: Counter[str] = Counter()
    for solution in solutions:
        inputs = LabelInputs(
            solution, votes[solution.key], seed, labels or LabelsConfig(), meta_critiques or {}
        )
        label = LABEL_METHODS[method](inputs)
        if isinstance(label, Dropped):
            dropped[label.reason] += 1
        else:
            labelled.append(label)
    return labelled, dict(dropped)


def label_by_single(inputs: LabelInputs) -> Label:
    """Method 1: vote 0, whole."""
    return _label_by_vote("single", "single", inputs)


def label_by_outcome_consistency(inputs: LabelInputs) -> Label:
    """Method 2: a random vote with the majority's final verdict, whole."""
    return _label_by_vote("outcome_consistency", "outcome_consistency", inputs)


def label_by_step_consistency(inputs: LabelInputs) -> Label:
    """Method 3: a random vote that agrees with the majority on every step, whole."""
    return _label_by_vote("step_consistency", "step_consistency", inputs)


def label_by_meta_critique(inputs: LabelInputs) -> Label:
    """Method 4: the merge of vote 0 and its critique."""
    return _label_by_merge("meta_critique", "single", inputs)


def label_by_hybrid_outcome(inputs: LabelInputs) -> Label:
    """Method 5: meta-critique of the vote that outcome consistency chooses."""
    return _label_by_merge("hybrid_outcome", "outcome_consistency", inputs)


def label_by_hybrid_step(inputs: LabelInputs) -> Label:
    """Method 5 on steps, as in the authors' scripts: meta-critique of the step-consistent vote."""
    return _label_by_merge("hybrid_step", "step_consistency", inputs)


def label_by_reference(inputs: LabelInputs) -> Label:
    """Method 6, a declared baseline: a vote among verifications that saw the answer.

    The paper does not say how the vote is chosen. ``labels.reference_pick`` defaults to step
    consistency, so that the baseline differs from the best reference-free method in the prompt
    alone. Raises ``ValueError`` for a verification that did not see the answer.
    """
    if not all(isinstance(v, ReferenceVerification) for v in inputs.verifications):
        raise ValueError(
            f"{REFERENCE_GUIDED}: solution {inputs.solution.key} has verifications that did not "
            "see the answer"
        )
    choice = VOTE_CHOICES[inputs.labels.reference_pick or "step_consistency"](inputs)
    if isinstance(choice, Dropped):
        return choice
    return _labelled(REFERENCE_GUIDED, inputs.solution, choice)


LABEL_METHODS: dict[str, LabelMethod] = {
    "single": label_by_single,
    "outcome_consistency": label_by_outcome_consistency,
    "step_consistency": label_by_step_consistency,
    "meta_critique": label_by_meta_critique,
    "hybrid_outcome": label_by_hybrid_outcome,
    "hybrid_step": label_by_hybrid_step,
    REFERENCE_GUIDED: label_by_reference,
}
"""By the names of ``config.LABEL_METHODS``."""


def choose_vote(
    name: str,
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int,
    labels: LabelsConfig,
) -> VoteChoice | Dropped:
    """The verification that a reference-free vote choice picks.

    Raises ``ValueError`` if a verification saw the answer.
    """
    return _choose_without_answers(name, LabelInputs(solution, verifications, seed, labels))


def critique_text(critique: Critique) -> str | Dropped:
    """A critique without thinking; ``Dropped`` if it was cut off or is empty."""
    if critique.finish_reason == "length":
        return Dropped("critique_truncated")
    if critique.finish_reason != "stop":
        return Dropped("critique_engine_error")
    text = after_thinking(critique.text)
    if isinstance(text, ParseFailure) or not text.strip():
        return Dropped("critique_parse_failure")
    return text.strip()


def method_tokens(method: str, inputs: LabelInputs) -> int:
    """Generated tokens that a method needs for one solution, labelled or not.

    ``single`` needs vote 0 alone, the other methods every vote, and meta-critique the critique and
    the merge too. Prompts and the solution are not counted; they are the same for every method.
    """
    choice_name = REVISED_METHODS.get(method, method)
    needed = list(inputs.verifications)
    if choice_name == "single":
        needed = [v for v in needed if v.vote == 0]
    tokens = sum(v.num_tokens for v in needed)
    if method in REVISED_METHODS:
        choice = _choose_without_answers(choice_name, inputs)
        if not isinstance(choice, Dropped):
            meta_critique = inputs.meta_critiques.get(choice.verification.key)
            tokens += meta_critique.num_tokens if meta_critique is not None else 0
    return tokens


def _votes_by_solution(
    solutions: Sequence[Solution], verifications: Iterable[Verification]
) -> dict[str, list[Verification]]:
    votes: dict[str, list[Verification]] = {solution.key: [] for solution in solutions}
    if len(votes) != len(solutions):
        raise ValueError(
            f"{len(solutions) - len(votes)} solutions were given twice; their keys must differ"
        )
    for verification in verifications:
        if verification.solution_key not in votes:
            raise ValueError(
                f"verification {verification.key} is of solution {verification.solution_key}, "
                "which was not given"
            )
        votes[verification.solution_key].append(verification)
    for key, of_solution in votes.items():
        numbers = [v.vote for v in of_solution]
        if len(set(numbers)) != len(numbers):
            raise ValueError(
                f"solution {key}: two verifications have the same vote number, of {numbers}"
            )
    return votes


def _label_by_vote(method: str, choice_name: str, inputs: LabelInputs) -> Label:
    choice = _choose_without_answers(choice_name, inputs)
    if isinstance(choice, Dropped):
        return choice
    return _labelled(method, inputs.solution, choice)


def _label_by_merge(method: str, choice_name: str, inputs: LabelInputs) -> Label:
    """Label with the merge of the chosen vote and its critique.

    A merge that cannot be read drops the solution: falling back on the vote itself would mix two
    methods under one name.
    """
    choice = _choose_without_answers(choice_name, inputs)
    if isinstance(choice, Dropped):
        return choice
    meta_critique = inputs.meta_critiques.get(choice.verification.key)
    if meta_critique is None:
        return Dropped("critique_missing")
    text = critique_text(meta_critique.critique)
    if isinstance(text, Dropped):
        return text
    merge = meta_critique.merge
    if merge is None:
        return Dropped("merge_missing")
    if not isinstance(merge.outcome, Verdict):
        return Dropped(f"merge_{outcome_kind(merge.outcome)}")
    if len(merge.outcome.step_labels) != len(choice.verification.outcome.step_labels):
        return Dropped("merge_step_count")
    # The merge prompt asks for a last line that agrees with the steps, whatever the vote did.
    if inputs.labels.require_consistent_verdict and not is_coherent(merge.outcome):
        return Dropped("merge_incoherent")
    return _labelled(method, inputs.solution, choice, merge)


def _choose_without_answers(name: str, inputs: LabelInputs) -> VoteChoice | Dropped:
    if any(isinstance(v, ReferenceVerification) for v in inputs.verifications):
        raise ValueError(
            f"{name}: solution {inputs.solution.key} has verifications that saw the answer; only "
            f"{REFERENCE_GUIDED} may read them"
        )
    return VOTE_CHOICES[name](inputs)


def _labelled(
    method: str, solution: Solution, choice: VoteChoice, merge: Merge | None = None
) -> LabelledSolution:
    source = choice.verification if merge is None else merge
    assert isinstance(source.outcome, Verdict)
    return LabelledSolution(
        method=method,
        solution=solution,
        step_labels=source.outcome.step_labels,
        answer_correct=source.outcome.answer_correct,
        target_text=source.text,
        evidence=LabelEvidence(
            correct_votes=choice.count.correct_votes,
            num_votes=choice.count.num_votes,
            yes_votes=choice.count.yes_votes,
            chosen_vote=choice.verification.vote,
            matching_votes=choice.matching,
            chosen_by=choice.rule,
            chosen_key=choice.verification.key,
            critique_key=merge.critique_key if merge is not None else None,
            merge_key=merge.key if merge is not None else None,
        ),
    )
