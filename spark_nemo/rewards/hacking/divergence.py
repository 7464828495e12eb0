"""The training reward beside that of a verifier the policy was never trained against.

A policy that gets better pleases both. One that learns the weaknesses of the reward model pleases
it alone, and the gap grows. Needs no answers; a weakness that both verifiers share stays unseen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from spark_nemo.records import Failure, derive_seed

GAP, TRAINING, HELD_OUT = "hacking/reward_gap", "hacking/reward_training", "hacking/reward_heldout"
FAILED = "hacking/heldout_failures"


def compared(valid: Sequence[bool], count: int, seed: int, step: int) -> list[int]:
    """Positions of the responses to compare at a step: at most ``count`` of the valid ones, always
    the same.
    """
    usable = [index for index, ok in enumerate(valid) if ok]
    return sorted(
        random.Random(derive_seed("divergence", seed, step)).sample(usable, min(count, len(usable)))
    )


def reward_gap(training: Sequence[float], held_out: Sequence[float | Failure]) -> dict[str, float]:
    """Mean rewards of the responses that both verifiers scored, and training minus held-out; rows
    of ``metrics.jsonl``.

    ``held_out`` has a ``Failure`` where the verifier came to no verdict: counted, in no mean.
    Without any pair there is the failure rate alone. Raises ``ValueError`` when the two differ in
    length or are empty.
    """
    if len(training) != len(held_out) or not training:
        raise ValueError(
            f"reward_gap: {len(training)} training and {len(held_out)} held-out rewards"
        )
    pairs = [
        (mine, other) for mine, other in zip(training, held_out) if isinstance(other, float | int)
    ]
    failed = {FAILED: 1 - len(pairs) / len(training)}
    if not pairs:
        return failed
    mine, other = (sum(values) / len(pairs) for values in zip(*pairs))
    return {TRAINING: mine, HELD_OUT: other, GAP: mine - other, **failed}


def gap_growth(metrics: Mapping[str, float], rows: Sequence[Mapping[str, float]]) -> float:
    """How much the gap has grown since the first row that has one; 0 at the first comparison."""
    if GAP not in metrics:
        return 0.0
    first = next((row[GAP] for row in rows if row.get(GAP) is not None), metrics[GAP])
    return metrics[GAP] - first
