"""Typed records that pass between the rooms, and the store that keeps them. No torch, no answers."""

from .types import (
    LabelEvidence,
    LabelledSolution,
    Problem,
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
    "EngineError", "Failure", "FormatViolation", "LabelEvidence", "LabelledSolution", "Outcome", "ParseFailure",
    "Problem", "Rollout", "Solution", "TokenSpan", "Truncated", "Verdict", "Verification", "content_key",
    "derive_seed", "outcome_from_json", "outcome_kind", "outcome_to_json",
]
