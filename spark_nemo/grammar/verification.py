"""Verification text: written as a training target, parsed to a verdict.

    ## Step 1: <title>
    <analysis>
    **This step is correct.**

    **Verification: Is the answer correct (Yes/No)? Yes**

The parser tolerates variants whose meaning is clear: one to six ``#`` or ``**Step k: ..**`` as
header, a label anywhere in its block or without its period, and a verdict line without bold,
``Verification:`` or ``(Yes/No)``. Prose before the first header, after a label and after the
verdict line is ignored, and so is ASCII case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.records import Outcome, ParseFailure, Verdict

from .markers import FLAGS, STEP_HEADER, after_header

_LABEL = re.compile(r"\*\*This step is (?P<negation>in)?correct\.?\*\*", FLAGS)
# A verdict is a line of its own: a question quoted in prose does not count.
_VERDICT_LINE = re.compile(
    r"^[ \t]*+\**+[ \t]*+(?:Verification:[ \t]*+\**+[ \t]*+)?Is the answer correct[ \t]*+(?:\(Yes/No\))?[ \t]*+\?"
    r"[ \t]*+\**+[ \t]*+(?P<verdict>Yes|No)\.?[ \t]*+\**+\.?[ \t\r]*+$",
    FLAGS,
)
_THINK, _END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class StepJudgement:
    """Judgement of one step; title and analysis may be empty."""

    title: str
    analysis: str
    correct: bool


@dataclass(frozen=True, slots=True)
class ParsedVerification:
    """A complete verification; ``judgements[k]`` is about step ``k + 1``."""

    judgements: tuple[StepJudgement, ...]
    answer_correct: bool

    @property
    def verdict(self) -> Verdict:
        """Step labels and final verdict."""
        return Verdict(
            tuple(judgement.correct for judgement in self.judgements), self.answer_correct
        )


def verdict_line(answer_correct: bool) -> str:
    """Last line of every step-wise verification."""
    return f"**Verification: Is the answer correct (Yes/No)? {'Yes' if answer_correct else 'No'}**"


def render_verification(judgements: Sequence[StepJudgement], answer_correct: bool) -> str:
    """Canonical text, the inverse of ``parse_judgements``.

    An empty analysis has no line. Raises ``ValueError`` without judgements, and naming the step if
    a title or analysis has white space at an end or contains a header, a label, a verdict line or a
    think tag.
    """
    if not judgements:
        raise ValueError("render_verification: at least one judgement is needed")
    blocks = []
    for number, judgement in enumerate(judgements, start=1):
        for name, value in (("title", judgement.title), ("analysis", judgement.analysis)):
            fault = _fault(value)
            if fault is not None:
                raise ValueError(f"render_verification: {name} of step {number} {fault}")
        if "\n" in judgement.title:
            raise ValueError(f"render_verification: title of step {number} is more than one line")
        header = f"## Step {number}: {judgement.title}" if judgement.title else f"## Step {number}:"
        label = f"**This step is {'correct' if judgement.correct else 'incorrect'}.**"
        blocks.append("\n".join(part for part in (header, judgement.analysis, label) if part))
    return "\n\n".join([*blocks, verdict_line(answer_correct)])


def parse_judgements(text: str, num_steps: int | None = None) -> ParsedVerification | ParseFailure:
    """Parse a verification after its thinking (the last ``</think>``). Never raises.

    Steps must be numbered 1..n, each with exactly one label, and ``n`` must equal ``num_steps``
    unless that is None: nothing is padded or cut. Verdict lines count only after the last label,
    and they must agree.
    """
    body = after_thinking(text)
    if isinstance(body, ParseFailure):
        return body
    headers = [match for match in STEP_HEADER.finditer(body) if match["hash"] or match["bold"]]
    fault = numbering_fault([match["number"] for match in headers], num_steps)
    if fault is not None:
        return fault
    bounds = [*(match.start() for match in headers), len(body)]
    judgements = []
    last_label_end = 0
    for index, header in enumerate(headers):
        labels = list(_LABEL.finditer(body, header.end(), bounds[index + 1]))
        if len(labels) != 1:
            return ParseFailure(
                f"step_label: {len(labels)} labels in step {index + 1}, exactly one is needed"
            )
        (label,) = labels
        line_end = body.find("\n", header.end())
        if not 0 <= line_end < label.start():
            return ParseFailure(f"step_label: on the header line of step {index + 1}")
        judgements.append(
            StepJudgement(
                title=after_header(body, header, line_end),
                analysis=body[line_end : label.start()].strip(),
                correct=label["negation"] is None,
            )
        )
        last_label_end = label.end()
    answer_correct = parse_verdict_lines(body, last_label_end)
    if isinstance(answer_correct, ParseFailure):
        return answer_correct
    return ParsedVerification(tuple(judgements), answer_correct)


def parse_verification(text: str, num_steps: int | None = None) -> Outcome:
    """``parse_judgements`` reduced to its verdict."""
    parsed = parse_judgements(text, num_steps)
    return parsed if isinstance(parsed, ParseFailure) else parsed.verdict


def after_thinking(text: str) -> str | ParseFailure:
    """Text after the last ``</think>``; a ``<think>`` without an end is a failure."""
    body = text.rpartition(_END_THINK)[2]
    return ParseFailure("think_unclosed") if _THINK in body else body


def parse_verdict_lines(body: str, start: int) -> bool | ParseFailure:
    """Verdict on which the verdict lines from ``start`` on agree."""
    verdicts = {match["verdict"].lower() for match in _VERDICT_LINE.finditer(body, start)}
    if not verdicts:
        return ParseFailure("verdict_missing: no verdict line after the last step")
    if len(verdicts) > 1:
        return ParseFailure("verdict_contradictory: verdict lines disagree")
    return verdicts == {"yes"}


def is_verdict_line(line: str) -> bool:
    """True if a single line is a verdict line."""
    return _VERDICT_LINE.fullmatch(line) is not None


def numbering_fault(numbers: list[str], num_steps: int | None) -> ParseFailure | None:
    """Broken rule of the written step numbers: at least one, 1..n in order, n as known."""
    if not numbers:
        return ParseFailure("steps_missing: no step header")
    for expected, number in enumerate(numbers, start=1):
        if number != str(expected):
            return ParseFailure(
                f"step_numbering: Step {number[:8]} where Step {expected} was expected"
            )
    if num_steps is not None and len(numbers) != num_steps:
        return ParseFailure(f"step_count: {len(numbers)} steps judged, {num_steps} in the solution")
    return None


def _fault(value: str) -> str | None:
    """Reason why a title or analysis would not parse back, or None."""
    if value != value.strip():
        return "has white space at an end: strip it"
    if any(match["hash"] or match["bold"] for match in STEP_HEADER.finditer(value)):
        return "contains a step header"
    if _LABEL.search(value):
        return "contains a step label"
    if _VERDICT_LINE.search(value):
        return "contains a verdict line"
    if _THINK in value or _END_THINK in value:
        return "contains a think tag"
    return None
