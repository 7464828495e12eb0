r"""Format gate of the reward: a response that breaks a rule is never shown to the reward model.

The published gate ends after the first four rules, so a box may be anywhere and
``\boxed{9}<answer>nine</answer>`` passes. Here the box must be inside the answer tag, and the steps
must parse: the verifier sees nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spark_nemo.records import FormatViolation, ParsedResponse, ParseFailure

from .markers import find_boxes
from .steps import StepFormat, split_response


@dataclass(frozen=True, slots=True)
class FormatRule:
    """A rule; ``holds(text)`` may rely on the rules listed before it."""

    name: str
    holds: Callable[[str], bool]


def _box_is_complete(text: str) -> bool:
    boxes = find_boxes(text)
    return len(boxes) == 1 and "\n" not in boxes[0].content


def _one_answer_tag(text: str) -> bool:
    counts = (text.count("<answer>"), text.count("</answer>"))
    return counts == (1, 1) and text.index("<answer>") < text.index("</answer>")


def _box_in_answer(text: str) -> bool:
    (box,) = find_boxes(text)
    return text.index("<answer>") < box.start and box.end <= text.index("</answer>")


RULES: tuple[FormatRule, ...] = (
    # Count the bare command, so that a broken or double-backslash box cannot accompany the real one.
    FormatRule("one_box", lambda text: text.count("\\boxed") == 1),
    FormatRule("box_complete_on_one_line", _box_is_complete),
    FormatRule("one_answer_tag", _one_answer_tag),
    FormatRule("nothing_after_answer", lambda text: not text.partition("</answer>")[2].strip()),
    FormatRule("box_in_answer", _box_in_answer),
)
"""In the order in which they are checked; the first one broken names the violation."""
TAGGED_STEPS = "tagged_steps"
"""The last rule: the steps parse."""


def check_format(
    text: str, parsed: ParsedResponse | ParseFailure | None = None
) -> FormatViolation | None:
    """Return the first rule that a policy response (special tokens removed) breaks, or None.

    ``parsed`` is ``split_response(text, StepFormat.TAGGED)`` where the caller has it already; after
    None it is a ``ParsedResponse``. Never raises on any text.
    """
    for rule in RULES:
        if not rule.holds(text):
            return FormatViolation(rule.name)
    if parsed is None:
        parsed = split_response(text, StepFormat.TAGGED)
    return None if isinstance(parsed, ParsedResponse) else FormatViolation(TAGGED_STEPS)
