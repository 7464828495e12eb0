"""Step inflation: effect on every reward design of splitting one correct step in two.

The split keeps the tokens. A design that is not in ``DECLARED`` fails here: its author must declare
whether it resists, with the same claim in the docstring of the function that defines it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_nemo.config import RLConfig
from spark_nemo.config.designs import (
    design_settings,
    designs,
    has_own_baseline,
    reward_and_advantage,
)
from spark_nemo.config.registry import choose
from spark_nemo.records import (
    ParsedResponse,
    ParseFailure,
    Problem,
    Rollout,
    RolloutVerdict,
    TokenSpan,
    Verdict,
)
from spark_nemo.rewards import (
    RewardContext,
    compute_scores,
    majority_rewards,
    process_aware_reward,
    random_reward,
    rlvr_rewards,
    step_augmented_reward,
    step_average_reward,
)
from spark_nemo.training.advantage_estimator import compute_advantages
from spark_nemo.training.step_advantages import (
    capo_advantages,
    global_step_advantages,
    global_step_penalty_advantages,
    min_form_advantages,
    prefix_advantages,
    selective_advantages,
)

RESISTS, DOES_NOT = "Resists inflation", "Does *not* resist inflation"
DECLARED: dict[str, tuple[str, Callable]] = {
    "process_aware": (RESISTS, process_aware_reward),
    "selective": (RESISTS, selective_advantages),
    "selective_half": (RESISTS, selective_advantages),
    "prefix": (RESISTS, prefix_advantages),
    "capo": (RESISTS, capo_advantages),
    "rlvr": (RESISTS, rlvr_rewards),
    "majority": (RESISTS, majority_rewards),
    "random": (RESISTS, random_reward),
    "step_average": (DOES_NOT, step_average_reward),
    "step_augmented": (DOES_NOT, step_augmented_reward),
    "global_step": (DOES_NOT, global_step_advantages),
    "global_step_penalty": (DOES_NOT, global_step_penalty_advantages),
    "min_form": (DOES_NOT, min_form_advantages),
}
FIRST = 1
"""Tokens before the first step."""


@dataclass(frozen=True)
class Response:
    """A response in lengths: tokens of each step, its labels and verdict (None: the verification
    failed).
    """

    group: int
    lengths: tuple[int, ...]
    labels: tuple[bool, ...]
    answer: str
    verdict: bool | None

    def rollout(self) -> Rollout:
        ends = [FIRST + sum(self.lengths[:k]) for k in range(len(self.lengths) + 1)]
        spans = tuple(TokenSpan(a, b) for a, b in pairwise(ends))
        size = ends[-1] + 2
        steps = "".join("<step>" + "x" * n + "</step>" for n in self.lengths)
        return Rollout(
            Problem("p", "?"),
            self.group,
            (1,),
            (2,) * size,
            (-1.0,) * size,
            (0,) * size,
            rf"<think>{steps}</think><answer>\boxed{{{self.answer}}}</answer>",
            "stop",
            spans,
            verdict=self.verdict_on_it(),
        )

    def verdict_on_it(self) -> RolloutVerdict:
        return RolloutVerdict(
            None, ParseFailure("x") if self.verdict is None else Verdict(self.labels, self.verdict)
        )

    def split(self, step: int, cut: int) -> Response:
        halves = (cut, self.lengths[step] - cut)
        return replace(
            self,
            lengths=(*self.lengths[:step], *halves, *self.lengths[step + 1 :]),
            labels=(*self.labels[:step], True, *self.labels[step:]),
        )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Response], list[Response]]:
    """A batch, groups unequal and interleaved, and the same with one correct step of one response
    split.
    """

    def response() -> Response:
        lengths = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=4)))
        labels = tuple(draw(st.booleans()) for _ in lengths)
        return Response(
            draw(st.integers(0, 2)),
            lengths,
            labels,
            draw(st.sampled_from("78")),
            draw(st.sampled_from([True, True, False, False, None])),
        )

    batch = [response() for _ in range(draw(st.integers(2, 7)))]
    index = draw(st.integers(0, len(batch) - 1))
    step = draw(st.integers(0, len(batch[index].lengths) - 1))
    chosen = batch[index]
    batch[index] = replace(chosen, labels=(*chosen.labels[:step], True, *chosen.labels[step + 1 :]))
    split = list(batch)
    split[index] = batch[index].split(step, draw(st.integers(1, batch[index].lengths[step] - 1)))
    return batch, split


def totals(design: str, responses: list[Response], estimator: str = "grpo") -> list[float]:
    """Total advantage of each response under the design, through the same functions as in stage
    III.
    """
    reward, advantage = reward_and_advantage(design)
    settings = design_settings(design)
    if not has_own_baseline(advantage):
        settings["estimator"] = choose("rl/estimator", estimator)
    if design == "global_step_penalty":
        settings["advantage"] = replace(settings["advantage"], min_steps=1)
    config = RLConfig(**settings)
    rollouts = [r.rollout() for r in responses]
    if reward == "random":
        parsed = ParsedResponse("", (), "7", 0, 0)
        scores = [random_reward(parsed, seed) for seed in range(len(rollouts))]
    else:
        context = RewardContext(
            seed=0,
            step=0,
            group_size=len(rollouts),
            checker=lambda shown: [r"\boxed{7}" in text for _, text in shown],
        )
        scores = compute_scores(rollouts, config.reward, context)
    for rollout, score in zip(rollouts, scores, strict=True):
        rollout.valid = isinstance(score, float)
        rollout.reward = score if rollout.valid else math.nan
    got = compute_advantages(rollouts, config)
    if isinstance(got, torch.Tensor):
        got = [a.expand(len(r.response_ids)) for a, r in zip(got, rollouts)]
    return [float(row_R.double().sum()) for row_R in got]


def test_every_design_declares_itself() -> None:
    """The docstring makes the same claim, so that this table and the documentation agree."""
    assert sorted(DECLARED) == designs(), "say of a new design whether it resists inflation"
    for name, (claim, function) in DECLARED.items():
        text = " ".join(function.__doc__.split())
        assert claim in text and {RESISTS, DOES_NOT}.difference({claim}).pop() not in text, name


@pytest.mark.parametrize(
    "design", sorted(d for d, (claim, _) in DECLARED.items() if claim == RESISTS)
)
@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce_pp"]))
def test_a_design_that_resists_pays_nothing_for_a_split_step(
    design: str, pair, estimator: str
) -> None:
    """No response's total advantage changes, for any labels, verdicts, failures, group sizes and
    estimator.

    Tokens that a policy adds when it really inflates are not tested, nor are bounds on the number
    of steps (such as rl.advantage.min_steps), which a split may cross.
    """
    batch, split = pair
    assert totals(design, split, estimator) == pytest.approx(
        totals(design, batch, estimator), abs=1e-4
    )


WITNESS = [
    Response(0, (2, 2, 2), (True, False, True), "7", True),
    Response(0, (2, 3), (True, True), "7", True),
    Response(0, (3,), (False,), "8", False),
    Response(0, (2,), (True,), "8", False),
]


@pytest.mark.parametrize(
    "design", sorted(d for d, (claim, _) in DECLARED.items() if claim == DOES_NOT)
)
def test_a_design_that_does_not_resist_has_a_batch_that_shows_it(design: str) -> None:
    """Checks the designs declared as weak: splitting the first step of one of two responses changes
    its total advantage.
    """
    changes = []
    for index in (0, 1):
        split = [r.split(0, 1) if k == index else r for k, r in enumerate(WITNESS)]
        changes.append(abs(totals(design, split)[index] - totals(design, WITNESS)[index]))
    assert max(changes) > 1e-2
