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
from .voting import VoteCount, count_votes, majority

__all__ = [
    "EngineError", "Failure", "FormatViolation", "LabelEvidence", "LabelledSolution", "Outcome", "ParseFailure",
    "Problem", "Rollout", "Solution", "TokenSpan", "Truncated", "Verdict", "Verification", "VoteCount",
    "content_key", "count_votes", "derive_seed", "majority", "outcome_from_json", "outcome_kind", "outcome_to_json",
]
