"""Prompts for critiques, merges, and verifications with a reference answer.

They are not fields of ``PromptSet``: another field there would change its version, and with it the
key of every stored solution and verification.
"""

from __future__ import annotations

from dataclasses import dataclass

from spark_nemo.records import content_key

from . import paper_critique_prompts
from .prompts import GRAMMAR_VERSION, ChatMessages, fill_user_message


@dataclass(frozen=True, slots=True)
class CritiquePrompts:
    """Templates with ``{{question}}``, ``{{solution}}``, ``{{verification}}``, ``{{critique}}``,
    ``{{step_count}}`` and ``{{expected_answer}}`` in them; each makes one user message.

    The texts filled in have no thinking (``after_thinking``). The compact merge prompt has neither
    problem nor solution, because verification and critique quote the steps.
    """

    name: str
    critique_template: str
    merge_template: str
    reference_template: str
    step_count_line: str = ""

    @property
    def version(self) -> str:
        """``name-g<grammar>-<digest of all templates>``, for content keys."""
        digest = content_key(*(getattr(self, field) for field in self.__dataclass_fields__))
        return f"{self.name}-g{GRAMMAR_VERSION}-{digest[:8]}"

    def critique(self, question: str, solution_text: str, verification: str) -> ChatMessages:
        """Prompt for a critique of a verification."""
        return fill_user_message(
            self.critique_template,
            question=question,
            solution=solution_text,
            verification=verification,
        )

    def merge(
        self,
        question: str,
        solution_text: str,
        verification: str,
        critique: str,
        num_steps: int,
    ) -> ChatMessages:
        """Prompt for one verification that merges a verification and its critique."""
        return fill_user_message(
            self.merge_template,
            question=question,
            solution=solution_text,
            verification=verification,
            critique=critique,
            step_count=self._step_count(num_steps),
        )

    def verify_with_reference(
        self,
        question: str,
        solution_text: str,
        expected_answer: str,
        num_steps: int,
    ) -> ChatMessages:
        """Prompt of the reference-guided baseline: a verification with the expected answer."""
        return fill_user_message(
            self.reference_template,
            question=question,
            solution=solution_text,
            expected_answer=expected_answer,
            step_count=self._step_count(num_steps),
        )

    def _step_count(self, num_steps: int) -> str:
        return self.step_count_line.replace("{{n}}", str(num_steps))


def critique_prompts(name: str) -> CritiquePrompts:
    """Prompts of the prompt set ``paper`` or ``compact``. Raises ``ValueError`` for another name."""
    if name not in CRITIQUE_PROMPTS:
        raise ValueError(
            f"critique prompts {name!r}: choose one of {', '.join(sorted(CRITIQUE_PROMPTS))}"
        )
    return CRITIQUE_PROMPTS[name]


CRITIQUE_PROMPTS = {
    "paper": CritiquePrompts(
        name="paper",
        critique_template=paper_critique_prompts.CRITIQUE,
        merge_template=paper_critique_prompts.MERGE,
        reference_template=paper_critique_prompts.VERIFY_WITH_REFERENCE,
        step_count_line=paper_critique_prompts.STEP_COUNT_LINE,
    ),
    "compact": CritiquePrompts(
        name="compact",
        critique_template="Problem: {{question}}\n\nStudent Solution: {{solution}}\n\n"
        "Verification: {{verification}}\n\nCritique.",
        merge_template="Verification: {{verification}}\n\nCritique: {{critique}}\n\nMerge.",
        reference_template="Problem: {{question}}\n\nStudent Solution: {{solution}}\n\n"
        "Expected Answer: {{expected_answer}}\n\nLet's verify step by step.",
    ),
}
