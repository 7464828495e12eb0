"""From a scored batch to advantages, by configuration."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from spark_nemo.config import RLConfig
from spark_nemo.config.designs import design_settings, step_advantages
from spark_nemo.records import (
    AnswerVerdict,
    FormatViolation,
    ParseFailure,
    Problem,
    Rollout,
    RolloutVerdict,
    TokenSpan,
    Verdict,
)
from spark_nemo.training.advantage_estimator import compute_advantages, scored_responses
from spark_nemo.training.advantages import group_advantages

PER_TOKEN = step_advantages()
SPANS = (TokenSpan(0, 2), TokenSpan(2, 4))


def rollout(group: int, verdict: RolloutVerdict) -> Rollout:
    """Five tokens, two steps of two and an answer, with a process-aware reward; failures masked."""
    if verdict.violation:
        reward = 0.0
    elif isinstance(verdict.outcome, Verdict):
        reward = float(verdict.outcome.answer_correct)
    else:
        reward = math.nan
    return Rollout(
        problem=Problem(f"p{group}", "?"),
        group=group,
        prompt_ids=(1,),
        response_ids=(1, 2, 3, 4, 5),
        logprobs=(-1.0,) * 5,
        weight_versions=(0,) * 5,
        text="",
        finish_reason="stop",
        step_spans=SPANS,
        verdict=verdict,
        reward=reward,
        valid=not math.isnan(reward),
    )


def configured(advantage: str) -> RLConfig:
    """Bounds that two steps lie in."""
    settings = {} if advantage == "outcome" else design_settings(advantage)
    if advantage == "global_step_penalty":
        settings["advantage"] = replace(settings["advantage"], min_steps=2)
    return RLConfig(**settings)


def scored(*verdicts: RolloutVerdict, groups: tuple[int, ...]) -> list[Rollout]:
    return [rollout(group, verdict) for group, verdict in zip(groups, verdicts, strict=True)]


YES, NO = (
    RolloutVerdict(None, Verdict(labels, labels[1])) for labels in ((True, True), (True, False))
)
GATED, FAILED = (
    RolloutVerdict(FormatViolation("steps"), None),
    RolloutVerdict(None, ParseFailure("verdict_missing")),
)
BATCH = scored(YES, NO, GATED, FAILED, YES, NO, groups=(0, 0, 0, 0, 1, 1))


def test_the_default_is_the_groups_advantage_as_ever() -> None:
    """The default is bit for bit group_advantages with the std, one value per response."""
    expected = group_advantages(
        torch.tensor([r.reward for r in BATCH]),
        [r.group for r in BATCH],
        torch.tensor([r.valid for r in BATCH]),
        std_normalize=True,
    )
    assert torch.equal(compute_advantages(BATCH, RLConfig()), expected)


@pytest.mark.parametrize("advantage", PER_TOKEN)
def test_every_design_gives_each_token_of_each_response_a_finite_number(advantage: str) -> None:
    """Also where the format was broken; the response whose verification failed (masked, NaN) gets
    exactly 0.
    """
    rows = compute_advantages(BATCH, configured(advantage))
    assert [row.shape for row in rows] == [(5,)] * 6
    assert all(torch.isfinite(row).all() and row.dtype == torch.float32 for row in rows)
    assert rows[3].tolist() == [0.0] * 5
    assert sum(map(float, rows[0])) > sum(map(float, rows[1])), (
        "a success is above a failure of its group"
    )


@pytest.mark.parametrize("advantage", PER_TOKEN)
def test_the_error_gets_less_than_what_came_before_it(advantage: str) -> None:
    """In the failed response of the second group, the tokens of the incorrect step against those of
    the correct one. Under min-form the error's credit flows back to all tokens before it, so there
    they are no better.
    """
    row = compute_advantages(BATCH, configured(advantage))[5]
    if advantage == "min_form":
        assert row[:4].max() < 0
    else:
        assert row[2:4].max() < row[:2].min()


@pytest.mark.parametrize("advantage", PER_TOKEN)
def test_an_orms_verdict_is_refused_where_steps_are_read(advantage: str) -> None:
    """Not taken for a response without steps, nor for one whose labels are missing. The default
    reads no step.
    """
    said = RolloutVerdict(None, AnswerVerdict(True))
    batch = [replace(r, verdict=said) for r in BATCH[:2]]
    with pytest.raises(ValueError, match="no step labels"):
        compute_advantages(batch, configured(advantage))
    assert compute_advantages(batch, RLConfig()).shape == (2,)


def test_labels_of_another_count_are_reported_and_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It takes a bug to get here; then the log says so and the labels are dropped whole."""
    batch = scored(RolloutVerdict(None, Verdict((True, False, True), True)), NO, groups=(0, 0))
    assert [r.labelled_steps is None for r in scored_responses(batch)] == [True, False]
    assert "3 step labels for 2 sampled steps" in caplog.text
    assert len(set(compute_advantages(batch, configured("selective"))[0].tolist())) == 1
