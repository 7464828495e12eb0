"""A sampled response of the policy on its way from the engine to the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from .types import Problem
from .verdict import FormatViolation, ParseFailure, VariantOutcome


@dataclass(frozen=True, slots=True)
class Step:
    """A step's content (stripped, without its header or tags) and its characters ``[start, end)``.

    The range runs from the step's header or opening tag to the next step's, or to what closes the
    steps.
    """

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    r"""A response in the grammar. Steps touch: ``steps[k].end == steps[k + 1].start``.

    ``answer`` is one line without its ``\boxed{}``; ``[answer_start, answer_end)`` covers tag or
    header too.
    """

    text: str
    steps: tuple[Step, ...]
    answer: str
    answer_start: int
    answer_end: int

    @property
    def step_texts(self) -> tuple[str, ...]:
        """The steps' contents, in order."""
        return tuple(step.text for step in self.steps)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Half-open range ``[start, end)`` of token positions in a response."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"TokenSpan[{self.start}, {self.end}) is not a range")


@dataclass(frozen=True, slots=True)
class RolloutVerdict:
    """The reward model's judgement of one rollout.

    ``outcome`` is None exactly when ``violation`` kept the rollout from the verifier.
    ``num_tokens`` counts the verifier's tokens.
    """

    violation: FormatViolation | None
    outcome: VariantOutcome | None
    num_tokens: int = 0


@dataclass(slots=True)
class Rollout:
    """One sampled response, filled in stages.

    The generator sets everything up to ``parsed``; the judge, where a reward model is queried, sets
    ``verdict``; scoring sets ``reward`` and ``valid``. ``logprobs[t]`` is the engine's own
    log-probability of ``response_ids[t]`` after temperature, and ``weight_versions[t]`` the version
    of the policy weights that sampled it. A closing end-of-sequence token is part of
    ``response_ids`` and not of ``text``.
    """

    problem: Problem
    group: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    text: str
    finish_reason: str
    step_spans: tuple[TokenSpan, ...] = ()
    """Tokens of each parsed step; empty where the text does not parse."""
    parsed: ParsedResponse | ParseFailure | None = None
    """The text in the tagged format, parsed once; every later reader uses this result."""
    verdict: RolloutVerdict | None = None
    reward: float | None = None
    """NaN where the failure policy masks the rollout, so that using it by mistake shows."""
    valid: bool = True

    def __post_init__(self) -> None:
        lengths = (len(self.response_ids), len(self.logprobs), len(self.weight_versions))
        if len(set(lengths)) != 1:
            raise ValueError(
                f"rollout of {self.problem.problem_id}: "
                f"ids, logprobs, versions have lengths {lengths}"
            )
        if any(span.end > lengths[0] for span in self.step_spans):
            raise ValueError(
                f"rollout of {self.problem.problem_id}: a step span ends after token {lengths[0]}"
            )
