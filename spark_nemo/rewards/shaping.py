"""A reward for not running into the length limit."""

from __future__ import annotations


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft over-long punishment, to be added to the reward: 0 up to ``max_tokens - buffer``
    tokens, falling linearly to -1 at ``max_tokens``, -1 beyond. Source: arXiv 2503.14476, equation
    13.

    Says nothing about steps: splitting one without adding tokens changes nothing.
    Raises ``ValueError`` unless 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(
            f"overlong_penalty: buffer={buffer} must lie in 1..max_tokens={max_tokens}"
        )
    return -min(1.0, max(0.0, (num_tokens - (max_tokens - buffer)) / buffer))
