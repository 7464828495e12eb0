"""Reward hacking: what a response may not do, what is monitored, and when to warn."""

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
"""By name, as in the metrics ``hacking/<name>``."""


@dataclass
class ConstraintsConfig:
    """Rules for a response. One that breaks a rule is worth what a broken format is worth, and is
    not verified.

    The published method has the format gate alone. The two further rules that are on by default
    reject what no honest solution contains. The others can reject honest work and are off.
    """

    format_gate: bool = True
    r"""Require one complete ``\boxed{}``, inside the only ``<answer>``, nothing after it, and steps
    that parse (``grammar/format_gate.py``). Without it every ``<step>`` anywhere counts as a step
    and the last answer as the answer: it shows what the gate is for (``docs/hacking.md``) and is not
    meant for training.
    """
    min_steps: int | None = None
    """Fewest steps of a response. None is no limit."""
    max_steps: int | None = None
    """Most steps of a response. None is no limit."""
    min_tokens: int | None = None
    """Fewest tokens of a response, the end-of-sequence token included. None is no limit."""
    max_tokens: int | None = None
    """Most tokens of a response, the end-of-sequence token included. None is no limit."""
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
    """Symptoms, as the share of a training step's responses that show them. They reject nothing."""

    baseline_steps: int = 5
    """The run's own first training steps; later steps are compared with their mean step count and
    length.
    """
    inflation: float = 1.5
    """Steps are inflated above this multiple of the baseline's mean step count."""
    reduction: float = 0.6
    """Steps are reduced below this multiple of the baseline's mean step count."""
    length: float = 1.5
    """The length has drifted when a response has more tokens than the baseline's mean times this,
    or fewer than the mean divided by it.
    """
    alarm: float = 0.2
    """Warn, naming the detector, when its share reaches this."""

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
    """Highest-rewarded responses of every training step that are kept for a person to read; 0 keeps
    none.
    """

    def __post_init__(self) -> None:
        at_least("rl.hacking.top_rewards", self.top_rewards, 0)
