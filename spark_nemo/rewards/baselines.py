"""Rewards that need neither a reward model nor an answer key: what a reward design has to beat."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from spark_nemo.grammar import ParsedResponse, extract_boxed
from spark_nemo.records import FormatViolation, Rollout


def random_reward(gated: ParsedResponse | FormatViolation, seed: int) -> float:
    """``r = f * Bernoulli(0.5)``, a coin that depends on ``seed`` alone. Source: arXiv 2512.03244,
    figure 4.

    Resists inflation: no step is read.
    """
    return 0.0 if isinstance(gated, FormatViolation) else float(random.Random(seed).random() < 0.5)


def majority_rewards(rollouts: Sequence[Rollout], key: Callable[[str], str]) -> list[float]:
    """``r = 1`` for the responses whose boxed answer is the most frequent one of their group, else
    0. Source: TTRL, arXiv 2504.16084. No format gate, like RLVR.

    ``key`` maps answers of equal meaning to one string. A response without an answer has no vote
    and is worth 0 by this definition. Among equally frequent answers the one seen first wins.
    Groups go by id and may differ in size.

    Resists inflation: no step is read.
    """
    answers = [extract_boxed(rollout.text) for rollout in rollouts]
    keys = [key(answer) if answer else "" for answer in answers]
    votes: dict[int, Counter[str]] = {}
    for rollout, answer in zip(rollouts, keys):
        if answer:
            votes.setdefault(rollout.group, Counter())[answer] += 1
    labels = {group: counted.most_common(1)[0][0] for group, counted in votes.items()}
    return [
        float(bool(answer) and answer == labels[rollout.group])
        for rollout, answer in zip(rollouts, keys)
    ]
