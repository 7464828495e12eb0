"""The rules a response has to keep, as a table; ``rl.reward.constraints`` says which of them are
on.

The format gate comes first and is ``grammar.check_format``, whole: one box, in the one answer,
nothing after it. A broken rule is a ``FormatViolation`` with the rule's name, which the rewards and
the metrics know already.
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
    """``holds(text, parsed, num_tokens, rules)`` is False when the response breaks the rule that
    ``setting`` names.
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
"""In the order in which they are looked at; the first one broken names the violation."""


def read_response(rollout: Rollout, rules: ConstraintsConfig) -> ParsedResponse | FormatViolation:
    """The gate f: the response in its steps, or the rule it broke.

    A truncated rollout breaks the format whatever its text says: nobody knows how it would have
    ended.
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
    """The first constraint that is on and broken; the format gate is not among them."""
    for constraint in CONSTRAINTS:
        if getattr(rules, constraint.setting) not in (None, False) and not constraint.holds(
            text, parsed, num_tokens, rules
        ):
            return FormatViolation(constraint.name)
    return None


def read_anyhow(text: str) -> ParsedResponse | None:
    """A response as a pipeline without a gate shows it: every ``<step>`` there is, each with all
    that follows up to the next (an earlier answer too, without its tag), and the last answer.

    None when there is no step or no answer, or when a step could not be shown to the verifier as
    one.
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
