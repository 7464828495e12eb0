"""Table of rules for a response; ``rl.reward.constraints`` enables them.

The format gate comes first and is ``grammar.check_format``: one box, in the only answer, nothing
after it. A broken rule is a ``FormatViolation`` with the rule's name, like any other violation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from spark_nemo.config.hacking import ConstraintsConfig
from spark_nemo.grammar import (
    ParsedResponse,
    Step,
    StepFormat,
    canonical_solution,
    check_format,
    extract_boxed,
    split_response,
)
from spark_nemo.records import FormatViolation, Rollout

from .text_patterns import duplicated_steps, empty_steps, judge_directed

_OPENING, _TAG = re.compile(r"<step>"), re.compile(r"</?(?:think|step|answer)>")


@dataclass(frozen=True, slots=True)
class Constraint:
    """Rule of the setting ``setting``.

    ``holds(text, parsed, num_tokens, rules)`` is False if the response breaks it.
    """

    name: str
    setting: str
    holds: Callable[[str, ParsedResponse, int, ConstraintsConfig], bool]


CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(
        "too_few_steps",
        "min_steps",
        lambda _, parsed, __, rules: len(parsed.steps) >= rules.min_steps,
    ),
    Constraint(
        "too_many_steps",
        "max_steps",
        lambda _, parsed, __, rules: len(parsed.steps) <= rules.max_steps,
    ),
    Constraint(
        "too_short", "min_tokens", lambda _, __, num_tokens, rules: num_tokens >= rules.min_tokens
    ),
    Constraint(
        "too_long", "max_tokens", lambda _, __, num_tokens, rules: num_tokens <= rules.max_tokens
    ),
    Constraint(
        "empty_step",
        "no_empty_steps",
        lambda _, parsed, __, ___: not empty_steps(parsed.step_texts),
    ),
    Constraint(
        "duplicated_step",
        "no_duplicated_steps",
        lambda _, parsed, __, ___: not duplicated_steps(parsed.step_texts),
    ),
    Constraint(
        "judge_directed_text",
        "no_judge_directed_text",
        lambda text, _, __, ___: not judge_directed(text),
    ),
)
"""Rules in the order of their checks; the first broken one names the violation."""


def read_response(rollout: Rollout, rules: ConstraintsConfig) -> ParsedResponse | FormatViolation:
    """Apply the gate f: return the response in steps, or the rule that it breaks.

    A truncated rollout is a violation whatever its text, since its ending is unknown.
    """
    if rollout.finish_reason != "stop":
        return FormatViolation("unfinished")
    assert rollout.parsed is not None, "the generator parses every rollout"
    if rules.format_gate:
        violation = check_format(rollout.text, rollout.parsed)
        if violation is not None:
            return violation
        parsed = rollout.parsed
    else:
        parsed = read_anyhow(rollout.text)
    if not isinstance(parsed, ParsedResponse):
        return FormatViolation("steps")
    return broken_constraint(rollout.text, parsed, len(rollout.response_ids), rules) or parsed


def broken_constraint(
    text: str,
    parsed: ParsedResponse,
    num_tokens: int,
    rules: ConstraintsConfig,
) -> FormatViolation | None:
    """Return the first enabled constraint that the response breaks, without the format gate."""
    for constraint in CONSTRAINTS:
        if getattr(rules, constraint.setting) not in (None, False) and not constraint.holds(
            text, parsed, num_tokens, rules
        ):
            return FormatViolation(constraint.name)
    return None


def read_anyhow(text: str) -> ParsedResponse | None:
    """Parse a response as a pipeline without a gate does: every ``<step>``, and the last answer.

    A step includes all text up to the next one, also an earlier answer, without its tag. Returns
    None if the response does not have a step or an answer, or if the verifier's text would split a
    step.
    """
    found = list(_OPENING.finditer(text))
    answer = (extract_boxed(text) or "").strip()
    if not found or not answer or "\n" in answer:
        return None
    last = text.rfind("<answer>", found[-1].end())
    end = last if last >= 0 else len(text)
    ends = [*(match.start() for match in found[1:]), end]
    bodies = [
        " ".join(_TAG.sub(" ", text[match.end() : stop]).split())
        for match, stop in zip(found, ends)
    ]
    steps = tuple(Step(body, match.start(), stop) for body, match, stop in zip(bodies, found, ends))
    parsed = ParsedResponse(text, steps, answer, end, len(text))
    try:
        shown = canonical_solution(parsed)
    except ValueError:
        return None
    return parsed if isinstance(split_response(shown, StepFormat.PLAIN), ParsedResponse) else None
