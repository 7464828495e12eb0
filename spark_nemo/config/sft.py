"""Settings of supervised fine-tuning, shared by stage II and the policy's format SFT."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ConfigError, at_least, one_of, without_effect
from .trainer import OptimizerConfig


@dataclass
class FineTuningConfig:
    """Supervised fine-tuning in stage II and in the format SFT."""

    epochs: int = 2
    """Passes over the training examples."""
    batch_size: int = 64
    """Sequences per optimizer step, over all data-parallel ranks."""
    max_length: int = 4096
    """Maximum prompt plus response tokens; longer examples are skipped and counted."""
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
    """Fine-tuning of ``models.policy_base`` on responses in the policy's format.

    Prompts are those of rl.prompt_set. The defaults are RL-Tango's, whose model the paper starts
    from; warm-up and decay are ours.
    """

    on_invalid: str = "error"
    """On a response that fails the format gate: ``error`` stops before training, ``drop`` skips and
    counts the response.
    """
    val_fraction: float = 0.1
    """Share of the problems, drawn by run.seed, held out for the validation loss."""
    eval_every: int | None = None
    """Optimizer steps between two validation losses; None is 100. Invalid with val_fraction=0."""
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
        """``eval_every``, or its default if it is not set."""
        return self.eval_every or 100
