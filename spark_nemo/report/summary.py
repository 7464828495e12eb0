"""Schema of ``summary.json``: plain dataclasses, and a reader that names an invalid field.

Shares, accuracies and F1 are fractions in [0, 1]; the page shows them times 100. A stage that did
not run is None or absent, and the page leaves it out; it is never written or shown as 0.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from math import isfinite
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class SummaryError(ValueError):
    """A summary that does not fit the schema; the one-line message names the field."""


@dataclass(frozen=True)
class Figure:
    """A number and its 95% interval, when there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise SummaryError("an interval needs both 'low' and 'high'")
        if self.low is not None and self.low > self.high:
            raise SummaryError(f"the interval [{self.low}, {self.high}] ends before it begins")


@dataclass(frozen=True)
class LabelScores:
    """Labels of one method against the truth.

    The accuracies are over the kept solutions, None when none was kept.
    """

    share_kept: float
    step_accuracy: Figure | None = None
    first_error_accuracy: Figure | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    """Dropped solutions by reason."""
    removed: dict[str, int] = field(default_factory=dict)
    """Labels that the filters and the balancing of stage II removed, by rule."""
    tokens_per_solution: float | None = None
    """Tokens of verifications, critiques and merges that the method needs per solution."""
    tokens_per_label: float | None = None
    """The same tokens per solution that got a label."""


@dataclass(frozen=True)
class Stage1Summary:
    """Verification data. ``failure_rates`` are shares of all verifications, by outcome kind."""

    problems: int
    solutions: int
    verifications: int
    failure_rates: dict[str, float] = field(default_factory=dict)
    label_quality: dict[str, LabelScores] = field(default_factory=dict)
    """By label method."""
    answers_shown_to_baseline: bool = False
    """True if answer keys were shown to the verifier, for the labels of reference_guided alone."""


@dataclass(frozen=True)
class MethodScores:
    """ProcessBench scores of the reward model trained on one method's labels."""

    acc_error: Figure
    acc_correct: Figure
    f1: Figure
    unparsed: int = 0
    """Cases without a readable prediction; they count as wrong."""


@dataclass(frozen=True)
class WholeSolutionScores:
    """Yes/No verdicts about whole solutions; not a ProcessBench score, since no step is named."""

    cases: int
    verdict_acc_error: Figure
    verdict_acc_correct: Figure
    verdict_harmonic_mean: Figure
    unparsed: int = 0
    """Cases without a verdict; they count as wrong."""


@dataclass(frozen=True)
class Stage2Summary:
    """Reward models by label method, with ``-prm`` or ``-orm`` after it for those kinds.

    ``f1`` repeats ``methods[...].f1.value`` for readers of the JSON.
    """

    cases: int
    f1: dict[str, float]
    methods: dict[str, MethodScores]
    f1_gain_interval: tuple[float, float] | None = None
    """95% interval of F1(step_consistency) - F1(single), paired over the cases."""
    whole_solutions: dict[str, WholeSolutionScores] = field(default_factory=dict)
    """Scores of every reward model if one of them is an ORM, which has no other score."""

    def __post_init__(self) -> None:
        if self.f1 != {name: scores.f1.value for name, scores in self.methods.items()}:
            raise SummaryError("'f1' must repeat the f1 values of 'methods'")
        if (
            self.f1_gain_interval is not None
            and not {"single", "step_consistency"} <= self.f1.keys()
        ):
            raise SummaryError("'f1_gain_interval' needs the methods single and step_consistency")


@dataclass(frozen=True)
class CurvePoint:
    """One RL step; only evaluation steps have ``true_accuracy``."""

    step: int
    reward: float | None = None
    true_accuracy: float | None = None
    failure_rates: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    mismatch: float | None = None
    """Mean absolute difference of engine and trainer log-probabilities, in nats per token."""
    hacking: dict[str, float] = field(default_factory=dict)
    """Share of the responses that each detector of reward hacking counts, by detector."""


@dataclass(frozen=True)
class ProbeResult:
    """Verdicts on adversarial responses of one kind at the last evaluation.

    ``failed`` responses got no verdict; ``refused_by`` is the constraint that rejects the kind.
    """

    kind: str
    asked: int
    accepted: int
    failed: int = 0
    refused_by: str | None = None


@dataclass(frozen=True)
class ScoredStep:
    """A step, its label by the reward model and, where known, its true label."""

    text: str
    correct: bool | None = None
    truly_correct: bool | None = None


@dataclass(frozen=True)
class ScoredSolution:
    """A sampled solution of an RL variant; ``failure`` is the reason for a missing ``verdict``."""

    question: str
    steps: list[ScoredStep]
    rl_variant: str = "spark"
    verdict: bool | None = None
    truly_correct: bool | None = None
    reward: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Stage3Summary:
    """Policies by RL variant.

    The keys are ``base`` (before RL), ``spark`` (reference-free: process-aware with a PRM-CoT), and
    for other variants their folder: a reward design, with ``-prm`` or ``-orm`` for that kind of
    reward model. ``rlvr`` read answer keys.

    ``accuracy`` is the mean over ``samples_per_problem`` samples at temperature, ``greedy`` one
    greedy sample. ``differences`` are paired over problems and named ``spark_minus_base``,
    ``spark_minus_rlvr`` and so on.
    """

    problems: int
    samples_per_problem: int
    accuracy: dict[str, float]
    accuracy_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    greedy: dict[str, Figure] = field(default_factory=dict)
    differences: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)
    solutions: list[ScoredSolution] = field(default_factory=list)
    probes: dict[str, list[ProbeResult]] = field(default_factory=dict)
    """Probes by RL variant; only variants with a reward model have any."""

    def __post_init__(self) -> None:
        unknown = self.accuracy_intervals.keys() - self.accuracy.keys()
        if unknown:
            raise SummaryError(
                f"'accuracy_intervals' names {sorted(unknown)}, which 'accuracy' does not have"
            )
        for rl_variant, points in self.curves.items():
            steps = [point.step for point in points]
            if steps != sorted(set(steps)):
                raise SummaryError(f"curves.{rl_variant}: steps must increase")


@dataclass(frozen=True)
class RoundSummary:
    """One round of labelling with the configured method.

    From round 2 on, the reward model of the round before verifies.
    """

    number: int
    labels: LabelScores | None = None
    f1: Figure | None = None


@dataclass(frozen=True)
class Summary:
    """One run; ``seconds`` and ``tokens`` are by stage (``stage1``, ``stage2``, ...)."""

    title: str
    seeds: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    """Commands that produced the run."""
    stage1: Stage1Summary | None = None
    stage2: Stage2Summary | None = None
    stage3: Stage3Summary | None = None
    rounds: list[RoundSummary] = field(default_factory=list)
    """Empty for a run of one round."""
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    reads_answer_keys: dict[str, str] | None = None
    """Stage runs that read answer keys to train, and the reason; None if this was not recorded."""


def read_summary(data: Mapping[str, Any]) -> Summary:
    """Check a plain dict (as from ``summary.json``); raises ``SummaryError`` for a bad field."""
    return _read(Summary, data, "summary")


def to_plain(summary: Summary) -> dict[str, Any]:
    """Invert ``read_summary``: return dicts, lists, strings, numbers and None only."""
    return json.loads(json.dumps(asdict(summary), allow_nan=False))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin in (Union, types.UnionType):
        # Every union of this file is ``X | None``.
        if value is None:
            return None
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return _read(inner, value, where)
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is dict:
        _expect(isinstance(value, Mapping), where, "an object", value)
        return {
            str(name): _read(arguments[1], item, f"{where}.{name}") for name, item in value.items()
        }
    if origin in (list, tuple):
        _expect(isinstance(value, (list, tuple)), where, "a list", value)
        if origin is tuple:
            length = len(arguments)
            _expect(len(value) == length, where, f"a list of {length}", value)
        return origin(_read(arguments[0], item, f"{where}[{k}]") for k, item in enumerate(value))
    if kind is float:
        _expect(type(value) in (int, float) and isfinite(value), where, "a finite number", value)
        return float(value)
    meaning = {int: "an integer", bool: "true or false", str: "a string"}[kind]
    _expect(type(value) is kind, where, meaning, value)
    return value


def _read_dataclass(kind: type[T], value: Any, where: str) -> T:
    _expect(isinstance(value, Mapping), where, "an object", value)
    known = {item.name: item for item in fields(kind)}
    for name in value:
        if name not in known:
            raise SummaryError(f"{where}.{name}: no such field; known are {', '.join(known)}")
    hints = get_type_hints(kind)
    arguments = {}
    for name, item in known.items():
        if name in value:
            arguments[name] = _read(hints[name], value[name], f"{where}.{name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise SummaryError(f"{where}.{name}: is missing")
    try:
        return kind(**arguments)
    except SummaryError as error:
        raise SummaryError(f"{where}: {error}") from None


def _expect(valid: bool, where: str, meaning: str, value: Any) -> None:
    if not valid:
        raise SummaryError(f"{where}: must be {meaning}, not {repr(value)[:40]}")
