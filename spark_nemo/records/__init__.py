"""Typed records that pass between the rooms, and the store that keeps them. No torch, no answers."""

from .types import (
    Critique,
    LabelEvidence,
    LabelledSolution,
    Merge,
    PolicyExample,
    Problem,
    ReferenceVerification,
    Revision,
    Rollout,
    Solution,
    TokenSpan,
    Verification,
    content_key,
    derive_seed,
)
from .verdict import (
    AnswerVerdict,
    EngineError,
    Failure,
    FormatViolation,
    Outcome,
    ParseFailure,
    Truncated,
    VariantOutcome,
    Verdict,
    outcome_from_json,
    outcome_kind,
    outcome_to_json,
)
from .voting import VoteCount, count_votes, majority

__all__ = [
    "AnswerVerdict", "Critique", "EngineError", "Failure", "FormatViolation", "LabelEvidence", "LabelledSolution",
    "Merge", "Outcome", "ParseFailure", "PolicyExample", "Problem", "ReferenceVerification", "Revision", "Rollout",
    "Solution", "TokenSpan", "Truncated", "VariantOutcome", "Verdict", "Verification", "VoteCount", "content_key",
    "count_votes", "derive_seed", "majority", "outcome_from_json", "outcome_kind", "outcome_to_json",
]
