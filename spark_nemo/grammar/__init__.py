"""The one text grammar of generator, verifier, reward model, format gate and evaluation. No torch."""

from spark_nemo.records import ParsedResponse, Step

from .answer_text import normalize_answer
from .boxed import Box, extract_boxed, find_boxes
from .critique_prompts import CRITIQUE_PROMPTS, CritiquePrompts, critique_prompts
from .format_gate import RULES, FormatRule, check_format
from .prompts import PROMPT_SETS, ChatMessages, PromptSet, prompt_set
from .steps import (
    Region,
    RegionKind,
    StepFormat,
    canonical_solution,
    decode_tokens,
    legal_step_text,
    regions,
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
    canonical_verification,
    parse_judgements,
    parse_verification,
    render_verification,
    verdict_line,
)
from .version import GRAMMAR_VERSION

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
    "Region",
    "RegionKind",
    "Step",
    "StepFormat",
    "StepJudgement",
    "Variant",
    "VariantOutcome",
    "canonical_solution",
    "canonical_verification",
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
    "regions",
    "render_solution",
    "render_target",
    "render_verification",
    "split_response",
    "token_spans",
    "verdict_line",
]
