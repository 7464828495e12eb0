"""The declared baseline: a reward from answer keys (RLVR). The keys stay with the checker that is
passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spark_nemo.records import Failure, Rollout

Checker = Callable[[Sequence[tuple[str, str]]], Sequence[bool | Failure]]
"""``checker([(problem_id, response_text), ...])``: does each response reach its problem's answer? A
``Failure`` where nobody could tell. It raises on an unknown id.
"""


def rlvr_rewards(rollouts: Sequence[Rollout], checker: Checker) -> list[float | Failure]:
    """1.0 where the checker accepts the rollout's text, else 0.0; a comparison that came to nothing
    stays the ``Failure`` it is. The paper's RLVR baseline has no format gate.

    Resists inflation: no step is read.
    """
    said = checker([(rollout.problem.problem_id, rollout.text) for rollout in rollouts])
    return [float(one) if isinstance(one, bool) else one for one in said]
