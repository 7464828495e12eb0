"""Labels from verifications: label methods and filters."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError, at_least, in_unit_interval, one_of, without_effect

VOTE_METHODS = ("single", "outcome_consistency", "step_consistency")
"""Reference-free methods that read votes alone; they also choose the verification to critique."""
REVISED_METHODS = {
    "meta_critique": "single",
    "hybrid_outcome": "outcome_consistency",
    "hybrid_step": "step_consistency",
}
"""Methods that read the merge of a verification and its critique, mapped to the vote method that
chooses the verification.
"""
REFERENCE_GUIDED = "reference_guided"
"""Declared baseline whose verifier reads the answer key."""
LABEL_METHODS = (*VOTE_METHODS, *REVISED_METHODS, REFERENCE_GUIDED)


@dataclass
class LabelsConfig:
    """Label rules and filters that the paper leaves open.

    ``verification.vote_choice`` and ``verification.label_filter`` explain the defaults.
    """

    ties: str = "drop"
    """On a tied step or verdict, ``drop`` the solution or count the tie as ``incorrect``."""
    no_match: str = "drop"
    """When no vote agrees with the majority on every step, ``drop`` the solution or take the
    closest vote (``hamming``).
    """
    require_consistent_verdict: bool = True
    """Require that the verdict of a step-consistent or merged target agrees with its steps."""
    reference_pick: str | None = None
    """Vote method by which reference_guided chooses among its verifications. None is
    step_consistency.
    """
    balance: str = "consensus"
    """Equal numbers of Yes and No per problem, counted by the labels' own verdicts (consensus) or
    by answer keys (ground_truth, the published way and a declared baseline); none keeps every
    label.
    """
    max_per_verdict: int | None = None
    """Maximum labels of each verdict per problem, with balance. None is 3."""
    max_per_problem: int | None = None
    """Maximum labels per problem, without balance. None is unbounded."""
    min_agreement: float | None = None
    """Minimum share of the votes that agree with the label on every step; None keeps all."""
    max_entropy: float | None = None
    """Maximum entropy, in bits, of the votes on any step; None keeps all."""
    reference_answers: str | None = None
    """Answer keys of data.stage1_problems: allowed only with balance=ground_truth."""

    def __post_init__(self) -> None:
        one_of("labels.ties", self.ties, {"drop", "incorrect"})
        one_of("labels.no_match", self.no_match, {"drop", "hamming"})
        if self.reference_pick is not None:
            one_of("labels.reference_pick", self.reference_pick, VOTE_METHODS)
        one_of("labels.balance", self.balance, {"none", "consensus", "ground_truth"})
        for name in ("max_per_verdict", "max_per_problem"):
            if getattr(self, name) is not None:
                at_least(f"labels.{name}", getattr(self, name), 1)
        for name in ("min_agreement", "max_entropy"):
            if getattr(self, name) is not None:
                in_unit_interval(f"labels.{name}", getattr(self, name))
        if self.balance == "none" and self.max_per_verdict is not None:
            raise without_effect(
                "labels.max_per_verdict", self.max_per_verdict, "with labels.balance=none"
            )
        if self.balance != "none" and self.max_per_problem is not None:
            raise ConfigError(
                f"labels.max_per_problem={self.max_per_problem}: with "
                f"labels.balance={self.balance} the limit is labels.max_per_verdict, which keeps "
                "the balance"
            )
        if self.balance == "ground_truth" and self.reference_answers is None:
            raise ConfigError(
                "labels.balance=ground_truth needs labels.reference_answers (JSONL with problem_id "
                "and answer): a declared baseline that reads answer keys"
            )
        if self.balance != "ground_truth" and self.reference_answers is not None:
            raise without_effect(
                "labels.reference_answers",
                self.reference_answers,
                f"with labels.balance={self.balance}",
            )
