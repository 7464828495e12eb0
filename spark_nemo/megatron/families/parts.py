"""Parts of a model that only some families have, as numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the rotary frequencies (rope_type "llama3"); the formula is in
    ``megatron/rope.py``.
    """

    factor: float
    """By how much slow frequencies are slowed down further."""
    low_freq_factor: float
    """Wavelengths above ``original_max_positions / low_freq_factor`` are slow."""
    high_freq_factor: float
    """Wavelengths below ``original_max_positions / high_freq_factor`` stay as they are."""
    original_max_positions: int
    """Context length before the stretch."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.low_freq_factor <= 0 or self.original_max_positions < 1:
            raise ValueError(f"rope scaling {self}: factor is at least 1, the others are positive")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer instead of one feed-forward network."""

    count: int
    """Experts per layer."""
    per_token: int
    """Experts that see a token."""
    ffn_size: int
    """Width of one expert."""
    normalised: bool
    """Whether the weights of a token's experts are divided by their sum."""

    def __post_init__(self) -> None:
        numbers = (self.count, self.per_token, self.ffn_size)
        if (
            not all(isinstance(x, int) for x in numbers)
            or not 0 < self.per_token <= self.count
            or self.ffn_size < 1
        ):
            raise ValueError(
                f"num_experts={self.count!r}, num_experts_per_tok={self.per_token!r}, "
                f"moe_intermediate_size={self.ffn_size!r}: a token needs at least one expert and at most "
                "all, each with a width"
            )
        if not isinstance(self.normalised, bool):
            raise ValueError(f"norm_topk_prob={self.normalised!r} must be true or false")
