"""The result of a verification: a verdict, or one of four named failures to get one.

The caller decides what each failure costs (see ``config.FailurePolicy``); none of them can be read
as a number.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verification that parsed completely.

    ``step_labels[k]`` is True when step ``k + 1`` was judged correct; ``answer_correct`` is the
    final Yes/No line.
    """

    step_labels: tuple[bool, ...]
    answer_correct: bool

    def __post_init__(self) -> None:
        if not self.step_labels:
            raise ValueError(
                "Verdict.step_labels is empty: a verification without steps is a ParseFailure"
            )

    @property
    def first_error(self) -> int:
        """0-based index of the first step judged incorrect; -1 without one, as in ProcessBench."""
        for index, correct in enumerate(self.step_labels):
            if not correct:
                return index
        return -1


@dataclass(frozen=True, slots=True)
class ParseFailure:
    """A verification whose text is not in the grammar; ``reason`` names the first broken rule."""

    reason: str


@dataclass(frozen=True, slots=True)
class Truncated:
    """A verification that reached the token limit after ``num_tokens`` tokens."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class EngineError:
    """A request without text: the engine aborted or rejected it, timed out or died."""

    message: str


@dataclass(frozen=True, slots=True)
class FormatViolation:
    """A response that broke a format rule and was therefore never shown to the verifier."""

    rule: str


@dataclass(frozen=True, slots=True)
class AnswerVerdict:
    """An ORM's verdict on a whole solution.

    It does not have ``step_labels``, not even empty ones: code that counts steps fails on it
    instead of seeing a solution without steps.
    """

    answer_correct: bool


Failure = ParseFailure | Truncated | EngineError | FormatViolation
Outcome = Verdict | Failure
VariantOutcome = Verdict | AnswerVerdict | Failure
"""Outcome of any kind of reward model. Labels are made from ``Outcome`` only."""


_TYPES: dict[str, type] = {
    "verdict": Verdict,
    "answer_verdict": AnswerVerdict,
    "parse_failure": ParseFailure,
    "truncated": Truncated,
    "engine_error": EngineError,
    "format_violation": FormatViolation,
}
_KINDS = {outcome_type: kind for kind, outcome_type in _TYPES.items()}


def outcome_kind(outcome: VariantOutcome) -> str:
    """Return the snake-case name of the type, used as a metric key (``parse_failure``, ...)."""
    return _KINDS[type(outcome)]


def outcome_to_json(outcome: VariantOutcome) -> dict[str, object]:
    """Return a plain dict that ``outcome_from_json`` turns back into an equal object."""
    values = {name: getattr(outcome, name) for name in outcome.__dataclass_fields__}
    if isinstance(outcome, Verdict):
        values["step_labels"] = list(outcome.step_labels)
    return {"kind": outcome_kind(outcome), **values}


def outcome_from_json(data: dict[str, object]) -> VariantOutcome:
    """Return the outcome of ``outcome_to_json``; raises ``ValueError`` on an unknown kind."""
    kind = data.get("kind")
    if kind not in _TYPES:
        raise ValueError(f"unknown outcome kind {kind!r}")
    values = {name: value for name, value in data.items() if name != "kind"}
    if kind == "verdict":
        values["step_labels"] = tuple(values["step_labels"])  # type: ignore[arg-type]
    return _TYPES[kind](**values)  # type: ignore[index]
