"""The reward designs of stage III by name, and what each reads of the reward model.

A *design* is ``rl.reward``, or ``rl.advantage`` where that is not ``outcome``: the two never vary
together, for every advantage from step labels is defined on ``rl.reward=process_aware``. An *arm*
is a design with the kind of reward model that it asks; a baseline asks none.
"""

from __future__ import annotations

MODEL_REWARDS = {"process_aware", "step_average", "step_augmented"}
BASELINES = {"rlvr", "majority", "random"}
SELECTIVE = {"selective", "selective_half"}
ON_OUTCOME_ADVANTAGE = SELECTIVE | {"global_step", "global_step_penalty"}
"""Per-token advantages that start from the estimator's."""
OWN_BASELINE = {"min_form", "prefix", "capo"}
"""Per-token advantages that read no estimator."""
ADVANTAGES = ON_OUTCOME_ADVANTAGE | OWN_BASELINE
DESIGNS = MODEL_REWARDS | ADVANTAGES | BASELINES
NEEDS_STEP_LABELS = (MODEL_REWARDS - {"process_aware"}) | ADVANTAGES
"""Designs that an ORM cannot reward: it judges a solution as a whole."""
READS_ANSWER_KEYS = {"rlvr"}
VARIANTS = ("prm_cot", "prm", "orm")
"""Kinds of generative reward model; the first is the one whose name is left out of folders."""

VERIFIER_KNOBS = {
    "verifier_votes": 1,
    "verifier_min_votes": None,
    "verifier_queue": None,
    "verifier_deadline": None,
    "verifier_cache": None,
}
"""How the reward model is asked, with the values that mean *not set*; no baseline reads them."""
STEP_BOUNDS = {
    "selective_min_steps": SELECTIVE,
    "selective_max_steps": SELECTIVE,
    "step_penalty_min": {"global_step_penalty"},
    "step_penalty_max": {"global_step_penalty"},
}
"""Bounds on the number of steps, and the designs that read them. All are None when not set."""
SHAPING_KNOBS = {**dict.fromkeys(STEP_BOUNDS), "overlong_buffer": None}
"""Settings of the reward that came after the first runs, with the values that mean *not set*."""


def reward_and_advantage(design: str) -> tuple[str, str]:
    """``rl.reward`` and ``rl.advantage`` of a design."""
    return ("process_aware", design) if design in ADVANTAGES else (design, "outcome")


def asks_reward_model(design: str) -> bool:
    """Is the design a baseline or not?"""
    return design not in BASELINES


def variant_suffix(variant: str | None) -> str:
    """What a reward model's kind adds to a folder's name: nothing for a PRM-CoT, or where there is
    none.
    """
    return "" if variant in (None, VARIANTS[0]) else f"-{variant}"


def unread_failures(reward: str) -> list[str]:
    """The fields of ``rl`` on failures that a reward does not read; all are None when not set.

    Votes of the group and coins never fail. The answer checker of rlvr may, and is not asked again.
    """
    if asks_reward_model(reward):
        return []
    names = (
        ("retries",)
        if reward in READS_ANSWER_KEYS
        else ("action", "penalty", "retries", "max_rate")
    )
    return [f"failures.{name}" for name in names]


def unread_knobs(design: str) -> dict[str, object]:
    """The fields of ``rl``, by dotted name, that the design does not read, with the value that
    means *not set*.
    """
    unread: dict[str, object] = {
        name: None for name, readers in STEP_BOUNDS.items() if design not in readers
    }
    if not asks_reward_model(design):
        unread |= {**VERIFIER_KNOBS, "reward_model": None, "reward_variant": None}
        unread |= dict.fromkeys(unread_failures(design))
    if design in OWN_BASELINE:
        unread |= {"estimator": "grpo", "std_normalize": None, "overlong_buffer": None}
    return unread
