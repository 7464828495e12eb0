"""Rollouts as tensors, the form in which the other trainer ranks get them."""

from __future__ import annotations

import math
from dataclasses import replace

from spark_nemo.records import (
    FormatViolation,
    Problem,
    Rollout,
    RolloutVerdict,
    TokenSpan,
    Verdict,
)
from spark_nemo.rollout.broadcast import from_tensors, to_tensors

PROBLEMS = [Problem("a", "1 + 1?"), Problem("b", "2 + 2?")]
LABELLED = Rollout(
    problem=PROBLEMS[1],
    group=3,
    prompt_ids=(5, 6, 7),
    response_ids=(1, 2, 3, 4),
    logprobs=(-0.1, -math.pi, -1e-9, 0.0),
    weight_versions=(4, 4, 5, 5),
    text="text",
    finish_reason="stop",
    step_spans=(TokenSpan(0, 1), TokenSpan(1, 1), TokenSpan(1, 3)),
    verdict=RolloutVerdict(None, Verdict((True, False, True), True), 7),
    reward=1 / 3,
)


def test_what_training_reads_survives_and_texts_stay_behind() -> None:
    """Every number to the last bit; a response without tokens, steps or labels is one of them."""
    empty = Rollout(PROBLEMS[0], 0, (9,), (), (), (), "", "length", reward=0.0)
    (labelled, other) = from_tensors(to_tensors([LABELLED, empty], PROBLEMS), PROBLEMS)
    verdict = replace(LABELLED.verdict, num_tokens=0)
    assert labelled == replace(LABELLED, text="", finish_reason="", verdict=verdict)
    assert other == replace(empty, finish_reason="")


def test_a_rollout_without_labels_has_no_verdict_on_the_other_ranks() -> None:
    """A masked rollout stays masked, with a reward that nothing can average."""
    gated = replace(
        LABELLED,
        verdict=RolloutVerdict(FormatViolation("steps"), None),
        reward=math.nan,
        valid=False,
    )
    (received,) = from_tensors(to_tensors([gated], PROBLEMS), PROBLEMS)
    assert received.verdict is None
    assert not received.valid and math.isnan(received.reward)
