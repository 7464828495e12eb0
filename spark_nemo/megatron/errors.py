"""Errors that a command line has to know without importing megatron-core."""

from __future__ import annotations


class NonFiniteGradient(RuntimeError):
    """The gradient norm is not a finite number; the optimizer step was not taken."""
