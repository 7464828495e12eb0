"""Filter of labels before training: by how sure the votes were, and by balance per problem.

**Balance by consensus** is the default. The paper keeps equally many correct and incorrect
solutions of a problem, at most three of each, and drops problems whose solutions are all of one
kind. It decides with reference answers, so its "reference-free" data was filtered with references.
Here a label's own final verdict decides, so no reference is read. The targets are balanced exactly:
as many end in Yes as in No for every problem. (The majority of all votes' last lines would be
another consensus. Under step consistency it can differ from the label, and the targets would not
come out balanced.) Without balance, the data leans to what the generator gets right, and a reward
model that always says Yes looks good. ``none`` keeps every label, for small data.

**Balance by ground truth** is the published way, kept as a declared baseline: the caller brings
``is_correct``, which knows the answers.

What is kept depends on the labels and the seed alone, not on the order of the labels.
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
_DEFAULT_MAX_PER_VERDICT = 3


@dataclass(frozen=True, slots=True)
class LabelFilter:
    """Rules for keeping labels; see ``config.LabelsConfig``.

    ``is_correct`` is None if the labels' own verdicts balance them.
    """

    balance: bool = True
    max_per_verdict: int = _DEFAULT_MAX_PER_VERDICT
    max_per_problem: int | None = None
    min_agreement: float | None = None
    max_entropy: float | None = None
    is_correct: IsCorrect | None = None

    @classmethod
    def from_config(cls, labels: LabelsConfig, is_correct: IsCorrect | None = None) -> LabelFilter:
        """The configured rules. Raises ``ValueError`` if ``is_correct`` does not fit them."""
        if (labels.balance == "ground_truth") != (is_correct is not None):
            raise ValueError(
                f"labels.balance={labels.balance}: only ground_truth balances by reference answers"
            )
        return cls(
            balance=labels.balance != "none",
            max_per_verdict=labels.max_per_verdict or _DEFAULT_MAX_PER_VERDICT,
            max_per_problem=labels.max_per_problem,
            min_agreement=labels.min_agreement,
            max_entropy=labels.max_entropy,
            is_correct=is_correct,
        )


@dataclass(frozen=True, slots=True)
class FilteredLabels:
    """Kept labels, in the order given, and the number each rule removed, by ``REASONS``."""

    kept: list[LabelledSolution]
    removed: dict[str, int] = field(default_factory=dict)


def filter_labels(
    labelled: Sequence[LabelledSolution], rules: LabelFilter, seed: int
) -> FilteredLabels:
    """Apply the rules in the order of ``REASONS``; the first that removes a label counts it."""
    # Reason of removal by solution; None keeps the label.
    removal = {label.solution.key: _uncertainty(label, rules) for label in labelled}
    if len(removal) != len(labelled):
        raise ValueError("a solution was given two labels of the same method")
    by_problem: dict[str, list[LabelledSolution]] = defaultdict(list)
    for label in labelled:
        if removal[label.solution.key] is None:
            by_problem[label.solution.problem_id].append(label)
    for labels in by_problem.values():
        # An order that neither the caller nor other labels can change.
        labels.sort(key=lambda label: derive_seed("select", label.solution.key, seed))
        if rules.balance:
            removal.update(_balance(labels, rules))
        else:
            removal.update(_limit(labels, rules.max_per_problem))
    reasons = [reason for reason in removal.values() if reason is not None]
    return FilteredLabels(
        kept=[label for label in labelled if removal[label.solution.key] is None],
        removed={reason: reasons.count(reason) for reason in REASONS if reason in reasons},
    )


def _uncertainty(label: LabelledSolution, rules: LabelFilter) -> str | None:
    # A merged label may contradict the votes; its agreement is low then.
    if rules.min_agreement is not None and min(label.step_agreement) < rules.min_agreement:
        return "low_agreement"
    if rules.max_entropy is not None and max(label.evidence.step_entropy) > rules.max_entropy:
        return "high_entropy"
    return None


def _balance(labels: Sequence[LabelledSolution], rules: LabelFilter) -> dict[str, str | None]:
    """Keep equally many labels of both sides of one problem, at most ``max_per_verdict`` each."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for label in labels:
        if rules.is_correct is None:
            is_correct = label.answer_correct
        else:
            is_correct = rules.is_correct(label)
        sides[is_correct].append(label.solution.key)
    smaller_side = min(len(keys) for keys in sides.values())
    if smaller_side == 0:
        return {label.solution.key: "one_sided_problem" for label in labels}
    num_kept = min(smaller_side, rules.max_per_verdict)
    removal: dict[str, str | None] = {}
    for keys in sides.values():
        for rank, key in enumerate(keys):
            if rank < num_kept:
                removal[key] = None
            elif rank < smaller_side:
                removal[key] = "over_limit"
            else:
                removal[key] = "unbalanced"
    return removal


def _limit(labels: Sequence[LabelledSolution], limit: int | None) -> dict[str, str | None]:
    removal: dict[str, str | None] = {}
    for rank, label in enumerate(labels):
        is_over = limit is not None and rank >= limit
        removal[label.solution.key] = "over_limit" if is_over else None
    return removal
