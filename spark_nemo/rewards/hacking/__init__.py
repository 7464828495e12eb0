"""Reward hacking: constraints that reject a response, and monitors that change nothing.

Every gated reward applies ``constraints``. ``detectors`` count symptoms in responses, ``probes``
test the reward model, and ``divergence`` compares it with a held-out verifier.
"""

from .constraints import CONSTRAINTS, broken_constraint, read_response

__all__ = ["CONSTRAINTS", "broken_constraint", "read_response"]
