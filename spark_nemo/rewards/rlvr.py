"""The declared baseline: a reward from answer keys (RLVR). The keys stay with the checker that is passed in."""

from __future__ import annotations

from collections.abc import Callable

from spark_nemo.records import Rollout

Checker = Callable[[str, str], bool]
"""``checker(problem_id, response_text)``: does the response reach the problem's answer? It raises on an unknown id."""


def rlvr_reward(rollout: Rollout, checker: Checker) -> float:
    """1.0 when the checker accepts the rollout's text, else 0.0. The paper's RLVR baseline has no format gate.

    Resists inflation: no step is read.
    """
    return float(checker(rollout.problem.problem_id, rollout.text))
