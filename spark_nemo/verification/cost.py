"""What a label costs: the generated tokens that a method needs beyond the solution itself."""

from __future__ import annotations

from collections.abc import Sequence

from spark_nemo.config import REVISED_METHODS
from spark_nemo.records import Solution, Verification

from .labelling import NO_REVISIONS, Revisions, pick_verification
from .vote_choice import DEFAULT_OPTIONS, Dropped, LabelOptions


def method_tokens(
    method: str,
    solution: Solution,
    verifications: Sequence[Verification],
    seed: int,
    options: LabelOptions = DEFAULT_OPTIONS,
    revisions: Revisions = NO_REVISIONS,
) -> int:
    """Tokens of the verifications, the critique and the merge that ``method`` needs for one
    solution, labelled or not.

    A single verification needs vote 0 alone, the methods by consistency every vote, and
    reference-guided labels every verification that saw the answer (those are then what
    ``verifications`` holds). Prompts and solutions are not counted; the latter are the same for
    every method.
    """
    pick = REVISED_METHODS.get(method, method)
    needed = [v for v in verifications if v.vote == 0] if pick == "single" else verifications
    tokens = sum(v.num_tokens for v in needed)
    if method in REVISED_METHODS:
        picked = pick_verification(pick, solution, verifications, seed, options)
        revision = None if isinstance(picked, Dropped) else revisions.get(picked.verification.key)
        tokens += revision.num_tokens if revision is not None else 0
    return tokens
