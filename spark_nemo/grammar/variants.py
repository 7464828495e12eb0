"""Kinds of generative reward model: their training targets and their parsers.

An ORM writes ``Yes`` or ``No``. A PRM writes ``Step k: Correct`` or ``Step k: Incorrect`` per line,
then the verdict line. A PRM-CoT writes the verification text of ``verification``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from spark_nemo.records import (
    AnswerVerdict,
    EngineError,
    ParseFailure,
    Truncated,
    VariantOutcome,
    Verdict,
)

from .markers import FLAGS
from .verification import (
    StepJudgement,
    after_thinking,
    is_verdict_line,
    numbering_fault,
    parse_verdict_lines,
    parse_verification,
    render_verification,
    verdict_line,
)


class Variant(StrEnum):
    """Kind of generative reward model; the values are those of ``stage2.variant``."""

    ORM = "orm"
    PRM = "prm"
    PRM_COT = "prm_cot"


_PRM_LINE = re.compile(
    r"^[ \t]*+\**+Step[ \t]++(?P<number>[0-9]++)[ \t]*+:[ \t]*+\**+[ \t]*+(?P<negation>in)?correct\.?\**+[ \t\r]*+$",
    FLAGS,
)


def render_target(
    variant: Variant, judgements: Sequence[StepJudgement], answer_correct: bool
) -> str:
    """Completion to train on. An ORM reads no judgements, a PRM only their labels.

    Raises ``ValueError`` if labels are needed without judgements, and as ``render_verification``.
    """
    variant = Variant(variant)
    if variant is Variant.ORM:
        return "Yes" if answer_correct else "No"
    if variant is Variant.PRM_COT:
        return render_verification(judgements, answer_correct)
    if not judgements:
        raise ValueError("render_target: at least one judgement is needed")
    lines = [
        f"Step {k}: {'Correct' if item.correct else 'Incorrect'}"
        for k, item in enumerate(judgements, start=1)
    ]
    return "\n".join([*lines, verdict_line(answer_correct)])


def parse_variant(variant: Variant, text: str, num_steps: int | None = None) -> VariantOutcome:
    """Parse a reward model's completion; an ORM's is an ``AnswerVerdict``. Never raises."""
    variant = Variant(variant)
    if variant is Variant.PRM_COT:
        return parse_verification(text, num_steps)
    if variant is Variant.ORM:
        return _parse_orm(text)
    return _parse_prm(text, num_steps)


def parse_verifier_output(
    text: str,
    finish_reason: str,
    num_tokens: int,
    num_steps: int | None,
    variant: Variant = Variant.PRM_COT,
) -> VariantOutcome:
    """Outcome of one generation: ``length`` is Truncated, ``abort`` an EngineError.

    An ``Outcome`` for the step-wise variants. Raises ``ValueError`` for another finish reason.
    """
    if finish_reason == "length":
        return Truncated(num_tokens)
    if finish_reason == "abort":
        return EngineError(f"aborted after {num_tokens} tokens")
    if finish_reason == "stop":
        return parse_variant(variant, text, num_steps)
    raise ValueError(f"finish_reason {finish_reason!r}: must be stop, length or abort")


def _parse_orm(text: str) -> AnswerVerdict | ParseFailure:
    """Parse ``Yes`` or ``No``, whatever its case, white space or one closing period."""
    body = after_thinking(text)
    if isinstance(body, ParseFailure):
        return body
    answer = body.strip().removesuffix(".").lower()
    if answer not in ("yes", "no"):
        return ParseFailure("orm_answer: neither Yes nor No")
    return AnswerVerdict(answer == "yes")


def _parse_prm(text: str, num_steps: int | None) -> Verdict | ParseFailure:
    """Parse step lines, then verdict lines that agree; only blank lines in addition."""
    body = after_thinking(text)
    if isinstance(body, ParseFailure):
        return body
    labels = list(_PRM_LINE.finditer(body))
    fault = numbering_fault([label["number"] for label in labels], num_steps)
    if fault is not None:
        return fault
    for line in body.split("\n"):
        if line.strip() and not _PRM_LINE.fullmatch(line) and not is_verdict_line(line):
            return ParseFailure("prm_line: a line is neither a step label nor the verdict")
    answer_correct = parse_verdict_lines(body, labels[-1].end())
    if isinstance(answer_correct, ParseFailure):
        return answer_correct
    return Verdict(tuple(label["negation"] is None for label in labels), answer_correct)
