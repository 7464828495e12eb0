"""What serves the models, and how tokens are drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError, at_least, one_of, without_effect


@dataclass
class SamplingConfig:
    """How an engine draws tokens; ``temperature=0`` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        at_least("sampling.temperature", self.temperature, 0)
        at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p}: must lie in (0, 1]")
        if self.temperature == 0 and self.top_p < 1:
            raise without_effect("sampling.top_p", self.top_p, "with sampling.temperature=0 (greedy)")


@dataclass
class EngineConfig:
    """The engine that generates and verifies."""

    kind: str = "local"
    max_batch_size: int = 256
    """Sequences decoded together (KV-cache slots)."""
    max_context: int = 4096
    """Prompt plus response tokens that one slot can hold."""

    def __post_init__(self) -> None:
        one_of("engine.kind", self.kind, {"local"})
        at_least("engine.max_batch_size", self.max_batch_size, 1)
        at_least("engine.max_context", self.max_context, 8)
