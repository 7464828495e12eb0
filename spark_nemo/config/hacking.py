"""Reward hacking: rules that reject a response, monitored symptoms, and alarms."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ConfigError, at_least, in_unit_interval

DETECTORS = (
    "solution_appending",
    "step_inflation",
    "step_reduction",
    "duplicated_steps",
    "judge_directed",
    "empty_text",
    "length_drift",
)
"""Names of the detectors, as in the metrics ``hacking/<name>``."""


@dataclass
class ConstraintsConfig:
    """Rules for a response. A response that breaks one has reward 0 and is not verified.

    The published method has the format gate alone. The two further rules that are on by default
    reject texts that no honest solution contains. The others can reject honest work and are off.
    """

    format_gate: bool = True
    r"""Require one complete ``\boxed{}``, inside the only ``<answer>``, nothing after it, and steps
    that parse (``grammar/format_gate.py``). Without the gate every ``<step>`` anywhere counts as a
    step and the last answer as the answer. Set false only to show the gate's effect
    (``docs/hacking.md``), not for training.
    """
    min_steps: int | None = None
    """Minimum steps of a response. None is unbounded."""
    max_steps: int | None = None
    """Maximum steps of a response. None is unbounded."""
    min_tokens: int | None = None
    """Minimum tokens of a response, the end-of-sequence token included. None is unbounded."""
    max_tokens: int | None = None
    """Maximum tokens of a response, the end-of-sequence token included. None is unbounded."""
    no_duplicated_steps: bool = False
    """Reject steps that are equal up to case, white space and punctuation at their ends."""
    no_judge_directed_text: bool = True
    """Reject words of the verification grammar, of the reward model's prompt or of a chat
    template.
    """
    no_empty_steps: bool = True
    """Reject steps without a letter or a digit. Steps without any text break the format gate."""

    def __post_init__(self) -> None:
        for name, least in (
            ("min_steps", 2),
            ("max_steps", 1),
            ("min_tokens", 2),
            ("max_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None:
                at_least(f"rl.reward.constraints.{name}", value, least)
        for what in ("steps", "tokens"):
            low = getattr(self, f"min_{what}")
            high = getattr(self, f"max_{what}")
            if low is not None and high is not None and low > high:
                raise ConfigError(
                    f"rl.reward.constraints.min_{what}={low}: at most max_{what}={high}; otherwise "
                    "no response could pass"
                )


@dataclass
class DetectorsConfig:
    """Shares of a training step's responses that show a symptom of hacking. They reject nothing."""

    baseline_steps: int = 5
    """Training steps at the run's beginning whose mean step count and length are the baseline."""
    inflation: float = 1.5
    """Steps are inflated above this multiple of the baseline's mean step count."""
    reduction: float = 0.6
    """Steps are reduced below this multiple of the baseline's mean step count."""
    length: float = 1.5
    """The length has drifted when a response has more tokens than the baseline's mean times this,
    or fewer than the mean divided by it.
    """
    alarm: float = 0.2
    """Warn when a detector's share of the responses reaches this value."""

    def __post_init__(self) -> None:
        at_least("rl.hacking.detectors.baseline_steps", self.baseline_steps, 1)
        for name in ("inflation", "length"):
            if not getattr(self, name) > 1:
                raise ConfigError(
                    f"rl.hacking.detectors.{name}={getattr(self, name)}: must be a multiple above 1"
                )
        if not 0 < self.reduction < 1:
            raise ConfigError(
                f"rl.hacking.detectors.reduction={self.reduction}: must be between 0 and 1"
            )
        in_unit_interval("rl.hacking.detectors.alarm", self.alarm)


@dataclass
class HackingConfig:
    """Detectors of reward hacking, which only report. The rules that reject a response are in
    ``rl.reward.constraints``; probes and the held-out verifier are in ``rl.reward``, too.
    """

    detectors: DetectorsConfig = field(default_factory=DetectorsConfig)
    top_rewards: int = 2
    """Number of highest-rewarded responses of every training step to save for inspection."""

    def __post_init__(self) -> None:
        at_least("rl.hacking.top_rewards", self.top_rewards, 0)
