"""Records of stages I and II. None has a field that could hold a reference answer.

Answer keys live in ``spark_nemo.evaluation.answers`` only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from math import log2
from typing import ClassVar

from .verdict import Outcome, outcome_from_json, outcome_to_json

# Kinds of records in the store of stage I.
SOLUTION = "solution"
VERIFICATION = "verification"
CRITIQUE = "critique"
MERGE = "merge"
REFERENCE_VERIFICATION = "reference_verification"


def content_key(*parts: object) -> str:
    """16 hex digits that depend on every part and on nothing else; the key of a stored result."""
    return hashlib.sha256(_canonical(parts)).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """63-bit seed from the parts, so that a sample does not depend on what was drawn before it."""
    return int.from_bytes(hashlib.sha256(_canonical(parts)).digest()[:8], "big") >> 1


def _canonical(parts: tuple[object, ...]) -> bytes:
    return json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode()


@dataclass(frozen=True, slots=True)
class Problem:
    """A question. It has neither an answer nor a difficulty estimated from answers."""

    problem_id: str
    question: str
    source: str = ""

    def __post_init__(self) -> None:
        if not self.problem_id or not self.question.strip():
            raise ValueError(
                f"problem {self.problem_id!r}: 'problem_id' and 'question' must not be empty"
            )


@dataclass(frozen=True, slots=True)
class PolicyExample:
    """A response in the policy's format to train on: a model's own text, not judged by any key."""

    problem_id: str
    question: str
    response: str


@dataclass(frozen=True, slots=True)
class Solution:
    """One sampled step-by-step solution. ``key`` identifies everything that determined it."""

    kind: ClassVar[str] = SOLUTION

    key: str
    problem_id: str
    question: str
    text: str
    finish_reason: str
    num_tokens: int
    num_prompt_tokens: int | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Solution:
        return cls(**data)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Verification:
    """One vote: the verifier's text on one solution and its parsed outcome."""

    kind: ClassVar[str] = VERIFICATION

    key: str
    solution_key: str
    vote: int
    text: str
    outcome: Outcome
    num_tokens: int
    num_prompt_tokens: int | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "key": self.key,
            "solution_key": self.solution_key,
            "vote": self.vote,
            "text": self.text,
            "outcome": outcome_to_json(self.outcome),
            "num_tokens": self.num_tokens,
            "num_prompt_tokens": self.num_prompt_tokens,
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Verification:
        return cls(**{**data, "outcome": outcome_from_json(data["outcome"])})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ReferenceVerification(Verification):
    """A verification whose prompt held the answer. The reference-free label methods reject it."""

    kind: ClassVar[str] = REFERENCE_VERIFICATION


@dataclass(frozen=True, slots=True)
class Critique:
    """A critic's text on one verification; it is merged only if ``finish_reason`` is ``stop``."""

    kind: ClassVar[str] = CRITIQUE

    key: str
    solution_key: str
    verification_key: str
    text: str
    finish_reason: str
    num_tokens: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Critique:
        return cls(**data)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Merge:
    """A verification and its critique in one text, which parses like a verification."""

    kind: ClassVar[str] = MERGE

    key: str
    solution_key: str
    verification_key: str
    critique_key: str
    text: str
    outcome: Outcome
    num_tokens: int

    def to_json(self) -> dict[str, object]:
        return {
            "key": self.key,
            "solution_key": self.solution_key,
            "verification_key": self.verification_key,
            "critique_key": self.critique_key,
            "text": self.text,
            "outcome": outcome_to_json(self.outcome),
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Merge:
        return cls(**{**data, "outcome": outcome_from_json(data["outcome"])})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class MetaCritique:
    """Critique and merge of one verification; ``merge`` is None if the critique was cut off."""

    critique: Critique
    merge: Merge | None

    @property
    def num_tokens(self) -> int:
        """Generated tokens of both."""
        merge_tokens = self.merge.num_tokens if self.merge is not None else 0
        return self.critique.num_tokens + merge_tokens


@dataclass(frozen=True, slots=True)
class LabelEvidence:
    """Votes behind a label, and the verification it was made from.

    ``correct_votes[k]`` of ``num_votes`` verifications judged step ``k + 1`` correct.
    ``matching_votes`` is the number of verifications the chosen one was drawn from. ``chosen_by``
    is the rule: ``first_vote``, ``verdict_majority``, ``step_majority`` or
    ``closest_to_step_majority``. ``critique_key`` and ``merge_key`` are set by meta-critique.
    """

    correct_votes: tuple[int, ...]
    num_votes: int
    yes_votes: int
    chosen_vote: int
    matching_votes: int
    chosen_by: str = ""
    chosen_key: str = ""
    critique_key: str | None = None
    merge_key: str | None = None

    @property
    def step_entropy(self) -> tuple[float, ...]:
        """Entropy in bits of the votes on each step: 0 when all agree, 1 on a tie."""
        return tuple(_entropy(votes / self.num_votes) for votes in self.correct_votes)


@dataclass(frozen=True, slots=True)
class LabelledSolution:
    """A solution, its label by one method, and the verification text to train on."""

    method: str
    solution: Solution
    step_labels: tuple[bool, ...]
    answer_correct: bool
    target_text: str
    evidence: LabelEvidence

    @property
    def step_agreement(self) -> tuple[float, ...]:
        """Per step, the share of the votes that agree with the label."""
        total = self.evidence.num_votes
        return tuple(
            (votes if correct else total - votes) / total
            for correct, votes in zip(self.step_labels, self.evidence.correct_votes)
        )

    @property
    def reason(self) -> str:
        """Explanation of the choice, for people."""
        evidence = self.evidence
        matching = f"one of {evidence.matching_votes} votes with the majority's"
        chosen = {
            "first_vote": "the first vote",
            "verdict_majority": f"{matching} verdict",
            "step_majority": f"{matching} label on every step",
            "closest_to_step_majority": "no vote has the majority's label on every step; "
            "this one is closest",
        }.get(evidence.chosen_by, evidence.chosen_by)
        if evidence.merge_key is not None:
            return f"{chosen}, merged with a critique of it"
        return chosen

    def to_json(self) -> dict[str, object]:
        """Plain dict, with the derived values added for readers of the file."""
        return {
            **asdict(self),
            "reason": self.reason,
            "step_agreement": self.step_agreement,
            "step_entropy": self.evidence.step_entropy,
        }


def _entropy(share: float) -> float:
    return 0.0 - sum(p * log2(p) for p in (share, 1 - share) if p > 0)
