"""Text grammar shared by generator, verifier, reward model, format gate and evaluation. No torch."""

from spark_nemo.records import ParsedResponse, Step

from .answer_text import normalize_answer
from .critique_prompts import CRITIQUE_PROMPTS, CritiquePrompts, critique_prompts
from .format_gate import RULES, FormatRule, check_format
from .markers import Box, extract_boxed, find_boxes
from .prompts import GRAMMAR_VERSION, PROMPT_SETS, ChatMessages, PromptSet, prompt_set
from .steps import (
    StepFormat,
    canonical_solution,
    decode_tokens,
    legal_step_text,
    render_solution,
    split_response,
    token_spans,
)
from .variants import (
    AnswerVerdict,
    Variant,
    VariantOutcome,
    parse_variant,
    parse_verifier_output,
    render_target,
)
from .verification import (
    ParsedVerification,
    StepJudgement,
    parse_judgements,
    parse_verification,
    render_verification,
    verdict_line,
)

__all__ = [
    "CRITIQUE_PROMPTS",
    "GRAMMAR_VERSION",
    "PROMPT_SETS",
    "RULES",
    "AnswerVerdict",
    "Box",
    "ChatMessages",
    "CritiquePrompts",
    "FormatRule",
    "ParsedResponse",
    "ParsedVerification",
    "PromptSet",
    "Step",
    "StepFormat",
    "StepJudgement",
    "Variant",
    "VariantOutcome",
    "canonical_solution",
    "check_format",
    "critique_prompts",
    "decode_tokens",
    "extract_boxed",
    "find_boxes",
    "legal_step_text",
    "normalize_answer",
    "parse_judgements",
    "parse_variant",
    "parse_verification",
    "parse_verifier_output",
    "prompt_set",
    "render_solution",
    "render_target",
    "render_verification",
    "split_response",
    "token_spans",
    "verdict_line",
]
