"""Reward hacking: what a response may not do, what is watched for, and when to warn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .errors import ConfigError, at_least, in_unit_interval, without_effect

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
WITHOUT_GATE = {"rlvr", "majority"}
"""Rewards without a format gate, where no constraint has an effect."""


@dataclass
class ConstraintsConfig:
    """Rules for a response; one that breaks a rule is worth what a broken format is worth and is
    not verified.

    The published method has the format gate alone. The two rules that are on beside it refuse what
    no honest solution contains; the others can refuse honest work and are off until somebody who
    knows the problems sets them.
    """

    format_gate: bool = True
    r"""One complete ``\boxed{}``, inside the only ``<answer>``, nothing after it, steps that parse
    (``grammar/format_gate.py``). Without it every ``<step>`` anywhere counts as a step and the last
    answer as the answer: there to show what the gate is for (``docs/hacking.md``), not to train
    with.
    """
    min_steps: int | None = None
    max_steps: int | None = None
    min_tokens: int | None = None
    """Tokens of the response, the closing end-of-sequence token included."""
    max_tokens: int | None = None
    no_duplicated_steps: bool = False
    """Steps that are equal when case, white space and punctuation at their ends are left aside."""
    no_judge_directed_text: bool = True
    """Words of the verification grammar, the reward model's prompt or a chat template in a
    response.
    """
    no_empty_steps: bool = True
    """Steps without a letter or a digit; steps without any text break the format gate already."""

    def __post_init__(self) -> None:
        for name, least in (
            ("min_steps", 2),
            ("max_steps", 1),
            ("min_tokens", 2),
            ("max_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and least == 2 and value < least:
                raise without_effect(
                    f"rl.hacking.constraints.{name}", value, "(every response has one)"
                )
            if value is not None:
                at_least(f"rl.hacking.constraints.{name}", value, least)
        for what in ("steps", "tokens"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low is not None and high is not None and low > high:
                raise ConfigError(
                    f"rl.hacking.constraints.min_{what}={low}: more than max_{what}={high}, so no "
                    "response could pass"
                )


@dataclass
class DetectorsConfig:
    """Symptoms, as the share of a training step's responses that show them. Nothing is refused
    because of them.
    """

    baseline_steps: int = 5
    """The run's own first training steps, whose mean step count and length later ones are compared
    with.
    """
    inflation: float = 1.5
    """A response has inflated steps with more than this multiple of the baseline's mean step count.
    """
    reduction: float = 0.6
    """A response has reduced steps with less than this multiple of it."""
    length: float = 1.5
    """A response has drifted when its tokens are more than the baseline's mean times this, or less
    than the mean divided by it.
    """
    alarm: float = 0.2
    """Warn, naming the detector, when its share reaches this."""

    def __post_init__(self) -> None:
        at_least("rl.hacking.detectors.baseline_steps", self.baseline_steps, 1)
        for name in ("inflation", "length"):
            if not getattr(self, name) > 1:
                raise ConfigError(
                    f"rl.hacking.detectors.{name}={getattr(self, name)}: a multiple above 1"
                )
        if not 0 < self.reduction < 1:
            raise ConfigError(
                f"rl.hacking.detectors.reduction={self.reduction}: a share between 0 and 1"
            )
        in_unit_interval("rl.hacking.detectors.alarm", self.alarm)


@dataclass
class HackingConfig:
    """Constraints that refuse, detectors and probes that only report. None is *not set*."""

    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)
    detectors: DetectorsConfig = field(default_factory=DetectorsConfig)
    probes: int | None = None
    """Problems that adversarial responses are made for, which the reward model scores at every
    evaluation; 0 is none. None is 8 where there is a reward model.
    """
    top_rewards: int = 2
    """Of every training step, how many of its highest-rewarded responses are kept for a person to
    read; 0 is none.
    """
    heldout_verifier: str | None = None
    """Folder of a second PRM-CoT that never trains the policy and is asked now and then what it
    would have paid.
    """
    divergence_every: int | None = None
    """Training steps between two such comparisons. None is ``rl.eval_every``."""
    divergence_samples: int | None = None
    """Responses compared at a time. None is 32."""
    divergence_alarm: float | None = None
    """Warn when the training reward minus the held-out one has grown by this since the first
    comparison. None is 0.1.
    """

    def __post_init__(self) -> None:
        at_least("rl.hacking.top_rewards", self.top_rewards, 0)
        if self.probes is not None:
            at_least("rl.hacking.probes", self.probes, 0)
        for name in ("divergence_every", "divergence_samples", "divergence_alarm"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.heldout_verifier is None:
                raise without_effect(
                    f"rl.hacking.{name}", value, "without rl.hacking.heldout_verifier"
                )
            if name == "divergence_alarm" and not value > 0:
                raise ConfigError(f"rl.hacking.{name}={value}: must be positive")
            if name != "divergence_alarm":
                at_least(f"rl.hacking.{name}", value, 1)

    def unread(self, reward: str, *, asks_reward_model: bool) -> dict[str, object]:
        """Settings under ``rl.hacking`` that a run with this reward would not read, by dotted name,
        with the value that takes each back; for a pipeline, whose arms share their settings.
        """
        back: dict[str, object] = {}
        if not asks_reward_model:
            names = (
                "probes",
                "heldout_verifier",
                "divergence_every",
                "divergence_samples",
                "divergence_alarm",
            )
            back = {name: None for name in names if getattr(self, name) is not None}
        if reward in WITHOUT_GATE:
            defaults = asdict(ConstraintsConfig()).items()
            back.update(
                {
                    f"constraints.{name}": unset
                    for name, unset in defaults
                    if getattr(self.constraints, name) != unset
                }
            )
        return back

    def check_rl(
        self, reward: str, advantage: str, max_new_tokens: int, *, asks_reward_model: bool
    ) -> None:
        """What the rest of ``rl`` makes impossible or idle. Raises ``ConfigError`` naming the
        field.
        """
        rules = self.constraints
        for name in self.unread(reward, asks_reward_model=asks_reward_model):
            value = getattr(rules, name.partition(".")[2]) if "." in name else getattr(self, name)
            why = "it has no format gate" if "." in name else "it has no reward model"
            raise without_effect(f"rl.hacking.{name}", value, f"with rl.reward={reward} ({why})")
        if rules.max_tokens is not None and rules.max_tokens >= max_new_tokens:
            raise without_effect(
                "rl.hacking.constraints.max_tokens",
                rules.max_tokens,
                f"with rl.sampling.max_new_tokens={max_new_tokens}",
            )
        if rules.min_tokens is not None and rules.min_tokens > max_new_tokens:
            raise ConfigError(
                f"rl.hacking.constraints.min_tokens={rules.min_tokens}: no response can have more than "
                f"rl.sampling.max_new_tokens={max_new_tokens}"
            )
        if not rules.format_gate and advantage != "outcome":
            raise ConfigError(
                f"rl.hacking.constraints.format_gate=false: steps of a text that does not parse have no "
                f"tokens, which rl.advantage={advantage} needs; choose rl.advantage=outcome"
            )
