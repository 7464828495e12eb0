"""From a labelled solution to what a reward model is trained on: its prompt and its target text."""

from __future__ import annotations

from spark_nemo.grammar import (
    ParsedResponse,
    PromptSet,
    StepFormat,
    Variant,
    parse_judgements,
    render_target,
    split_response,
)
from spark_nemo.grammar.verification import ParsedVerification
from spark_nemo.records import LabelledSolution


def sft_example(
    label: LabelledSolution, prompts: PromptSet, variant: Variant
) -> tuple[list[dict[str, str]], str]:
    """Chat messages and completion of one label, in the chosen variant.

    Raises ``ValueError`` when the stored texts are not in the grammar; stage I never labels such a
    solution.
    """
    parsed = split_response(label.solution.text, StepFormat.PLAIN)
    judged = parse_judgements(label.target_text, len(label.step_labels))
    if not isinstance(parsed, ParsedResponse) or not isinstance(judged, ParsedVerification):
        raise ValueError(
            f"solution {label.solution.key}: solution or chosen verification is not in the grammar"
        )
    messages = prompts.reward(variant, label.solution.question, parsed.canonical())
    return messages, render_target(variant, judged.judgements, judged.answer_correct)
