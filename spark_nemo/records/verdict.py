"""What a verification came to: a verdict, or one of four named ways of not getting one.

A caller has to say what each failure costs (see ``config.FailurePolicy``); none of them can be read
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
        """0-based index of the first step judged incorrect; -1 when there is none (ProcessBench's
        convention).
        """
        return next((k for k, correct in enumerate(self.step_labels) if not correct), -1)


@dataclass(frozen=True, slots=True)
class ParseFailure:
    """The verifier finished, but its text is not in the grammar; ``reason`` names the first rule it
    broke.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Truncated:
    """The verifier ran into its token limit after ``num_tokens`` tokens."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class EngineError:
    """The engine gave no text: aborted, refused, timed out or died."""

    message: str


@dataclass(frozen=True, slots=True)
class FormatViolation:
    """The *response under judgement* broke a format rule, so it was never shown to the verifier."""

    rule: str


@dataclass(frozen=True, slots=True)
class AnswerVerdict:
    """What an ORM says of a whole solution. It has no field ``step_labels``, not an empty one:
    whatever counts steps fails on it instead of seeing a solution without steps.
    """

    answer_correct: bool


Failure = ParseFailure | Truncated | EngineError | FormatViolation
Outcome = Verdict | Failure
VariantOutcome = Verdict | AnswerVerdict | Failure
"""Of any kind of reward model. Labels are made of ``Outcome`` only."""


def outcome_kind(outcome: VariantOutcome) -> str:
    """Snake-case name of the case, used as the metric key (``verdict``, ``parse_failure``, ...)."""
    return {
        Verdict: "verdict",
        AnswerVerdict: "answer_verdict",
        ParseFailure: "parse_failure",
        Truncated: "truncated",
        EngineError: "engine_error",
        FormatViolation: "format_violation",
    }[type(outcome)]


def outcome_to_json(outcome: VariantOutcome) -> dict[str, object]:
    """A plain dict that ``outcome_from_json`` turns back into an equal object."""
    fields = {name: getattr(outcome, name) for name in outcome.__dataclass_fields__}
    if isinstance(outcome, Verdict):
        fields["step_labels"] = list(outcome.step_labels)
    return {"kind": outcome_kind(outcome), **fields}


def outcome_from_json(data: dict[str, object]) -> VariantOutcome:
    """Inverse of ``outcome_to_json``. Raises ``ValueError`` on an unknown kind."""
    fields = {key: value for key, value in data.items() if key != "kind"}
    match data.get("kind"):
        case "verdict":
            return Verdict(tuple(fields["step_labels"]), bool(fields["answer_correct"]))  # type: ignore[arg-type]
        case "answer_verdict":
            return AnswerVerdict(**fields)  # type: ignore[arg-type]
        case "parse_failure":
            return ParseFailure(**fields)  # type: ignore[arg-type]
        case "truncated":
            return Truncated(**fields)  # type: ignore[arg-type]
        case "engine_error":
            return EngineError(**fields)  # type: ignore[arg-type]
        case "format_violation":
            return FormatViolation(**fields)  # type: ignore[arg-type]
    raise ValueError(f"unknown outcome kind {data.get('kind')!r}")
