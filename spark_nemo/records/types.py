"""The records of stages I to III. None of them has a field that could hold a reference answer.

Answer keys live in ``spark_nemo.evaluation.answers`` only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from math import log2

from .verdict import Outcome, outcome_from_json, outcome_to_json


def content_key(*parts: object) -> str:
    """16 hex digits that depend on every part and on nothing else; the fingerprint of a stored result."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the parts, so that a sample's randomness does not depend on what ran
    before it.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and nothing else: no answer, no difficulty estimated from answers."""

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
    """A response in the policy's format to learn from; some model's own text, which no key has
    judged.
    """

    problem_id: str
    question: str
    response: str


@dataclass(frozen=True, slots=True)
class Solution:
    """One sampled step-by-step solution. ``key`` identifies everything that determined it."""

    key: str
    problem_id: str
    question: str
    text: str
    finish_reason: str
    num_tokens: int
    num_prompt_tokens: int | None = None
    """None in records made before it was kept."""

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Solution:
        return cls(**data)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Verification:
    """One vote: the verifier's text on one solution and what it parsed to."""

    key: str
    solution_key: str
    vote: int
    text: str
    outcome: Outcome
    num_tokens: int
    num_prompt_tokens: int | None = None
    """None in records made before it was kept."""

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
    """A verification whose prompt gave the answer away: the declared baseline's, of a kind and type
    of its own.

    Labelling without answers refuses it.
    """


@dataclass(frozen=True, slots=True)
class Critique:
    """A critic's text on one verification. ``finish_reason`` other than ``stop`` means there is no
    merge.
    """

    key: str
    solution_key: str
    verification_key: str
    text: str
    finish_reason: str
    num_tokens: int

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Critique:
        return cls(**data)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Merge:
    """A verification and its critique made into one text, read by the parser that reads
    verifications.
    """

    key: str
    solution_key: str
    verification_key: str
    critique_key: str
    text: str
    outcome: Outcome
    num_tokens: int

    def to_json(self) -> dict[str, object]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "outcome": outcome_to_json(self.outcome)}

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Merge:
        return cls(**{**data, "outcome": outcome_from_json(data["outcome"])})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Revision:
    """What meta-critique made of one verification; ``merge`` is None when the critique was cut off."""

    critique: Critique
    merge: Merge | None

    @property
    def num_tokens(self) -> int:
        """Generated tokens of both."""
        return self.critique.num_tokens + (self.merge.num_tokens if self.merge is not None else 0)


@dataclass(frozen=True, slots=True)
class LabelEvidence:
    """Why a label says what it says: per step, the votes for correct and how many votes there were.

    ``matching_votes`` is how many verifications the chosen one was drawn from. ``chosen_by`` is the
    rule that chose it: ``first_vote``, ``verdict_majority``, ``step_majority`` or
    ``closest_to_step_majority``. The two last keys are those of a label that meta-critique made.
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
    """A solution with the label one method gave it and the text chosen, or merged, as the training
    target.
    """

    method: str
    solution: Solution
    step_labels: tuple[bool, ...]
    answer_correct: bool
    target_text: str
    evidence: LabelEvidence

    @property
    def step_agreement(self) -> tuple[float, ...]:
        """Share of the votes that say of each step what the label says."""
        total = self.evidence.num_votes
        return tuple(
            (votes if correct else total - votes) / total
            for correct, votes in zip(self.step_labels, self.evidence.correct_votes)
        )

    @property
    def reason(self) -> str:
        """Why this text is the label, for people."""
        evidence = self.evidence
        chosen = {
            "first_vote": "the first vote",
            "verdict_majority": f"one of {evidence.matching_votes} votes with the majority's verdict",
            "step_majority": f"one of {evidence.matching_votes} votes with the majority's label on every step",
            "closest_to_step_majority": "no vote has the majority's label on every step; this one is closest",
        }.get(evidence.chosen_by, evidence.chosen_by)
        return (
            f"{chosen}, merged with a critique of it" if evidence.merge_key is not None else chosen
        )

    def to_json(self) -> dict[str, object]:
        """A plain dict, with what can be computed from the rest for whoever reads the file."""
        return {
            **asdict(self),
            "reason": self.reason,
            "step_agreement": self.step_agreement,
            "step_entropy": self.evidence.step_entropy,
        }


def _entropy(share: float) -> float:
    return 0.0 - sum(p * log2(p) for p in (share, 1 - share) if p > 0)
