"""Chat prompts in the text grammar; ``paper_prompts`` has the long texts.

``PromptSet.version`` depends on every character of the set and on the grammar, so that results of
different prompts never share a key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from spark_nemo.records import content_key

from . import paper_prompts
from .variants import Variant

GRAMMAR_VERSION = "1"
"""Version of the text grammar: part of the keys of everything that is stored or trained on."""
ChatMessages = list[dict[str, str]]

_ORM = "Problem: {{question}}\n\nSolution: {{solution}}\n\nIs the answer correct (Yes/No)?"
_STEPWISE = "Problem: {{question}}\n\nStudent Solution: {{solution}}\n\nLet's verify step by step."


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Templates with ``{{question}}``, ``{{solution}}`` and ``{{step_count}}`` in them; each makes
    one user message.

    ``solution`` is always the text of ``canonical_solution`` (or ``render_solution``),
    whatever format the response had. ``step_count_line`` is what ``{{step_count}}`` becomes when
    the number of steps is known.
    """

    name: str
    solve_template: str
    policy_template: str
    verify_template: str
    step_count_line: str = ""
    orm_template: str = _ORM
    stepwise_template: str = _STEPWISE

    @property
    def version(self) -> str:
        """``name-g<grammar>-<digest of all templates>``, for content keys."""
        digest = content_key(*(getattr(self, field) for field in self.__dataclass_fields__))
        return f"{self.name}-g{GRAMMAR_VERSION}-{digest[:8]}"

    def solve(self, question: str) -> ChatMessages:
        """Ask the generator for a solution in StepFormat.PLAIN."""
        return fill_user_message(self.solve_template, question=question)

    def policy(self, question: str) -> ChatMessages:
        """Ask the policy for a response in StepFormat.TAGGED."""
        return fill_user_message(self.policy_template, question=question)

    def verify(
        self, question: str, solution_text: str, num_steps: int | None = None
    ) -> ChatMessages:
        """Ask a general model for a verification without a reference answer.

        ``num_steps`` is stated where the set has a place for it, which makes count mismatches
        rarer.
        """
        count = "" if num_steps is None else self.step_count_line.replace("{{n}}", str(num_steps))
        return fill_user_message(
            self.verify_template, question=question, solution=solution_text, step_count=count
        )

    def reward(self, variant: Variant, question: str, solution_text: str) -> ChatMessages:
        """Ask the fine-tuned reward model; PRM and PRM-CoT share a prompt and differ in what they
        were trained on.
        """
        template = self.orm_template if Variant(variant) is Variant.ORM else self.stepwise_template
        return fill_user_message(template, question=question, solution=solution_text)


def prompt_set(name: str) -> PromptSet:
    """The set called ``paper`` or ``compact``. Raises ``ValueError`` on another name."""
    if name not in PROMPT_SETS:
        raise ValueError(f"prompt set {name!r}: choose one of {', '.join(sorted(PROMPT_SETS))}")
    return PROMPT_SETS[name]


def fill_user_message(template: str, **values: str) -> ChatMessages:
    """One user message: ``template`` with every ``{{name}}`` replaced by the value of that name."""
    # One pass, so that braces in a question are never taken for a place to fill.
    content = re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], template)
    return [{"role": "user", "content": content}]


PROMPT_SETS = {
    "paper": PromptSet(
        name="paper",
        solve_template=paper_prompts.SOLVE,
        policy_template=paper_prompts.POLICY,
        verify_template=paper_prompts.VERIFY,
        step_count_line=paper_prompts.STEP_COUNT_LINE,
    ),
    # For models of about a million parameters, where every prompt token costs.
    "compact": PromptSet(
        name="compact",
        solve_template="{{question}}",
        policy_template="{{question}}\nUse tags.",
        verify_template=_STEPWISE,
    ),
}
