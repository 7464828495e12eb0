"""Which labels are trained on: filters by how sure the votes were, and balancing per problem.

**Balancing by consensus, the default.** The paper keeps equally many right and wrong solutions of a problem, at most
three of each, and drops problems whose solutions are all of one kind; but it decides right and wrong with reference
answers, so its "reference-free" data was still filtered with references. Here a label's own final verdict decides: no
reference is read, and what comes out balanced is exactly what is trained on, as many targets that end in Yes as in No
for every problem. (The majority of all votes' last lines would be another consensus; under step consistency it differs
from the label on solutions whose votes stumble here and there, and the targets would not come out balanced.) It is on
by default because without it the data leans to what the generator gets right, and a reward model that always says Yes
looks good. ``none`` keeps every label, for data too small to spare any.

**Balancing by ground truth** is the published way, kept as a declared baseline: the caller brings ``correct``, which
knows the answers; nothing here does.

What is kept depends on the labels and the seed alone: not on their order, nor on what else was
labelled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spark_nemo.config import LabelsConfig
from spark_nemo.records import LabelledSolution, derive_seed

IsCorrect = Callable[[LabelledSolution], bool]
REASONS = {
    "low_agreement": "too few votes agree with the label on a step (labels.min_agreement)",
    "high_entropy": "the votes on a step are too evenly split (labels.max_entropy)",
    "one_sided_problem": "all labels of the problem have the same verdict (labels.balance)",
    "unbalanced": "more labels of one verdict than of the other (labels.balance)",
    "over_limit": "above labels.max_per_verdict or labels.max_per_problem",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Rules for keeping labels; see ``config.LabelsConfig``. ``correct`` is None when labels
    balance themselves.
    """

    balance: bool = True
    max_per_verdict: int = 3
    max_per_problem: int | None = None
    min_agreement: float | None = None
    max_entropy: float | None = None
    correct: IsCorrect | None = None

    @classmethod
    def of(cls, labels: LabelsConfig, correct: IsCorrect | None = None) -> Selection:
        """The rules a configuration asks for. Raises ``ValueError`` when ``correct`` is missing or
        not wanted.
        """
        if (labels.balance == "ground_truth") != (correct is not None):
            raise ValueError(
                f"labels.balance={labels.balance}: only ground_truth balances by reference answers"
            )
        return cls(
            labels.balance != "none",
            labels.max_per_verdict or 3,
            labels.max_per_problem,
            labels.min_agreement,
            labels.max_entropy,
            correct,
        )


@dataclass(frozen=True, slots=True)
class Selected:
    """Kept labels, in the order given, and how many each rule removed, by the names of ``REASONS``."""

    kept: list[LabelledSolution]
    removed: dict[str, int] = field(default_factory=dict)


def select_labels(labelled: Sequence[LabelledSolution], rules: Selection, seed: int) -> Selected:
    """Apply the rules in the order of ``REASONS``; a label is counted under the first one that
    removes it.
    """
    fate = {label.solution.key: _unsure(label, rules) for label in labelled}
    if len(fate) != len(labelled):
        raise ValueError("a solution was given two labels of the same method")
    problems: dict[str, list[LabelledSolution]] = defaultdict(list)
    for label in labelled:
        if fate[label.solution.key] is None:
            problems[label.solution.problem_id].append(label)
    for labels in problems.values():
        # In an order of their own, which neither the caller's order nor other labels can change.
        labels.sort(key=lambda label: derive_seed("select", label.solution.key, seed))
        fate.update(
            _balanced(labels, rules) if rules.balance else _capped(labels, rules.max_per_problem)
        )
    removed = [reason for reason in fate.values() if reason is not None]
    return Selected(
        kept=[label for label in labelled if fate[label.solution.key] is None],
        removed={reason: removed.count(reason) for reason in REASONS if reason in removed},
    )


def _unsure(label: LabelledSolution, rules: Selection) -> str | None:
    """A merged label may go against the votes; then its agreement is low and says so."""
    if rules.min_agreement is not None and min(label.step_agreement) < rules.min_agreement:
        return "low_agreement"
    if rules.max_entropy is not None and max(label.evidence.step_entropy) > rules.max_entropy:
        return "high_entropy"
    return None


def _balanced(labels: Sequence[LabelledSolution], rules: Selection) -> dict[str, str | None]:
    sides: dict[bool, list[str]] = {True: [], False: []}
    for label in labels:
        right = label.answer_correct if rules.correct is None else rules.correct(label)
        sides[right].append(label.solution.key)
    shared = min(len(keys) for keys in sides.values())
    if shared == 0:
        return {label.solution.key: "one_sided_problem" for label in labels}
    kept = min(shared, rules.max_per_verdict)
    return {
        key: None if rank < kept else "over_limit" if rank < shared else "unbalanced"
        for keys in sides.values()
        for rank, key in enumerate(keys)
    }


def _capped(labels: Sequence[LabelledSolution], limit: int | None) -> dict[str, str | None]:
    return {
        label.solution.key: "over_limit" if limit is not None and rank >= limit else None
        for rank, label in enumerate(labels)
    }
