"""Gap between the training reward and the reward of a held-out verifier.

The rewards of a policy that improves rise with both verifiers. A policy that learns the weaknesses
of its reward model only raises the training reward, and the gap grows. No answers are needed, but a
weakness that both verifiers share is not detected.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from spark_nemo.records import Failure, derive_seed

GAP, TRAINING, HELD_OUT = "hacking/reward_gap", "hacking/reward_training", "hacking/reward_heldout"
FAILED = "hacking/heldout_failures"


def compared(valid: Sequence[bool], count: int, seed: int, step: int) -> list[int]:
    """Return the positions of at most ``count`` valid responses to compare, fixed by the seed."""
    usable = [index for index, ok in enumerate(valid) if ok]
    return sorted(
        random.Random(derive_seed("divergence", seed, step)).sample(usable, min(count, len(usable)))
    )


def reward_gap(training: Sequence[float], held_out: Sequence[float | Failure]) -> dict[str, float]:
    """Return mean rewards of the responses that both verifiers scored, and training minus held-out.

    A ``Failure`` in ``held_out`` counts in the failure rate and is left out of the means. Without
    any pair only the failure rate is returned. Raises ``ValueError`` if the two are empty or differ
    in length.
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
    """Return the gap's growth since the first row that has one; 0 at the first comparison."""
    if GAP not in metrics:
        return 0.0
    first = next((row[GAP] for row in rows if row.get(GAP) is not None), metrics[GAP])
    return metrics[GAP] - first
