"""The three kinds of generative reward model: what each is trained to write, and how that is read.

ORM writes ``Yes`` or ``No``. PRM writes ``Step k: Correct`` or ``Step k: Incorrect`` per line, then
the verdict line. PRM-CoT writes the verification text of ``verification``.
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
    """The completion to train on. ORM reads no judgements, PRM only their labels.

    Raises ``ValueError`` when there are no judgements but labels are needed, and like
    ``render_verification``.
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
    """Read a reward model's completion. ORM gives an ``AnswerVerdict`` and reads no step count.
    Never raises.
    """
    variant = Variant(variant)
    if variant is Variant.PRM_COT:
        return parse_verification(text, num_steps)
    return _parse_orm(text) if variant is Variant.ORM else _parse_prm(text, num_steps)


def parse_verifier_output(
    text: str,
    finish_reason: str,
    num_tokens: int,
    num_steps: int | None,
    variant: Variant = Variant.PRM_COT,
) -> VariantOutcome:
    """What one engine generation came to: ``length`` is Truncated, ``abort`` an EngineError,
    ``stop`` is parsed.

    An ``Outcome`` for the step-wise variants. Raises ``ValueError`` on another finish reason.
    """
    match finish_reason:
        case "length":
            return Truncated(num_tokens)
        case "abort":
            return EngineError(f"aborted after {num_tokens} tokens")
        case "stop":
            return parse_variant(variant, text, num_steps)
    raise ValueError(f"finish_reason {finish_reason!r}: must be stop, length or abort")


def _parse_orm(text: str) -> AnswerVerdict | ParseFailure:
    """``Yes`` or ``No`` alone; white space around it, ASCII case and one closing period do not
    matter.
    """
    body = after_thinking(text)
    if isinstance(body, ParseFailure):
        return body
    match body.strip().removesuffix(".").lower():
        case "yes":
            return AnswerVerdict(True)
        case "no":
            return AnswerVerdict(False)
    return ParseFailure("orm_answer: neither Yes nor No")


def _parse_prm(text: str, num_steps: int | None) -> Verdict | ParseFailure:
    """Step lines, then verdict lines that agree, blank lines anywhere and nothing else."""
    body = after_thinking(text)
    if isinstance(body, ParseFailure):
        return body
    labels = list(_PRM_LINE.finditer(body))
    if fault := numbering_fault([label["number"] for label in labels], num_steps):
        return fault
    for line in body.split("\n"):
        if line.strip() and not _PRM_LINE.fullmatch(line) and not is_verdict_line(line):
            return ParseFailure("prm_line: a line is neither a step label nor the verdict")
    answer_correct = parse_verdict_lines(body, labels[-1].end())
    if isinstance(answer_correct, ParseFailure):
        return answer_correct
    return Verdict(tuple(label["negation"] is None for label in labels), answer_correct)
