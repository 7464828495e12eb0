"""Supervised fine-tuning: what stage II and the policy's format SFT share, and the latter."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ConfigError, at_least, one_of, without_effect
from .trainer import OptimizerConfig


@dataclass
class FineTuningConfig:
    """Supervised fine-tuning, as stage II and the format SFT share it."""

    epochs: int = 2
    batch_size: int = 64
    """Sequences per optimizer step, over all data-parallel ranks."""
    max_length: int = 4096
    """Prompt plus response tokens; a longer example is left out and counted."""
    save_every: int = 100
    """Optimizer steps between two checkpoints."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(warmup_fraction=0.03, decay="cosine")
    )

    def check_bounds(self, section: str) -> None:
        """Raise ``ConfigError`` naming the setting of ``section`` that is out of bounds."""
        for name in ("epochs", "batch_size", "save_every"):
            at_least(f"{section}.{name}", getattr(self, name), 1)
        # One prompt token and one response token.
        at_least(f"{section}.max_length", self.max_length, 2)


@dataclass
class SftConfig(FineTuningConfig):
    """Fine-tuning of ``models.policy_base`` on responses in the policy's format. The prompt is that
    of rl.prompt_set.

    The defaults are RL-Tango's, whose result the paper starts from; warm-up and decay are ours.
    """

    on_invalid: str = "error"
    """What a response does that the format gate would refuse: error (nothing is trained) or drop
    (it is counted).
    """
    val_fraction: float = 0.1
    """Share of the problems, drawn by run.seed, whose responses are not trained on; their loss is
    logged.
    """
    eval_every: int | None = None
    """Optimizer steps between two held-out losses; None is 100. Not read with val_fraction=0."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=5e-6, warmup_fraction=0.03, decay="cosine")
    )

    def __post_init__(self) -> None:
        self.check_bounds("sft")
        one_of("sft.on_invalid", self.on_invalid, {"error", "drop"})
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"sft.val_fraction={self.val_fraction}: must lie in [0, 1)")
        if self.eval_every is not None:
            at_least("sft.eval_every", self.eval_every, 1)
            if self.val_fraction == 0:
                raise without_effect("sft.eval_every", self.eval_every, "with sft.val_fraction=0")

    @property
    def measured_every(self) -> int:
        """``eval_every``, resolved."""
        return self.eval_every or 100
