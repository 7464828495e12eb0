"""Typed records that pass between the rooms, and the store that keeps them. No torch, no answers."""

from .types import (
    Critique,
    LabelEvidence,
    LabelledSolution,
    Merge,
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
    EngineError,
    Failure,
    FormatViolation,
    Outcome,
    ParseFailure,
    Truncated,
    Verdict,
    outcome_from_json,
    outcome_kind,
    outcome_to_json,
)

__all__ = [
    "Critique", "EngineError", "Failure", "FormatViolation", "LabelEvidence", "LabelledSolution", "Merge", "Outcome",
    "ParseFailure", "Problem", "ReferenceVerification", "Revision", "Rollout", "Solution", "TokenSpan", "Truncated",
    "Verdict", "Verification", "content_key", "derive_seed", "outcome_from_json", "outcome_kind", "outcome_to_json",
]
