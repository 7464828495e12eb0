"""Advantages per token: golden values, inflation, and labels that do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from spark_nemo.grammar import parse_verifier_output
from spark_nemo.records import ParseFailure, TokenSpan
from spark_nemo.training.advantages import group_advantages
from spark_nemo.training.step_advantages import (
    ScoredResponse,
    capo_advantages,
    global_step_advantages,
    global_step_penalty_advantages,
    min_form_advantages,
    min_form_credit,
    prefix_advantages,
    selective_advantages,
    step_rewards,
)

SPANS = (TokenSpan(1, 3), TokenSpan(3, 4), TokenSpan(4, 6), TokenSpan(6, 7))
CICC = (True, False, True, True)


def response(reward, labels=CICC, spans=SPANS, group=0, valid=True) -> ScoredResponse:
    """Nine tokens: one before the steps, six in four steps, two of the answer."""
    return ScoredResponse(group, 9, reward, valid, spans, labels)


def outcome(responses):
    return group_advantages(
        torch.tensor([r.reward for r in responses]),
        [r.group for r in responses],
        torch.tensor([r.valid for r in responses]),
        std_normalize=False,
    )


DESIGNS = {
    "selective": lambda rs: selective_advantages(rs, outcome(rs), discount=0.0),
    "selective_half": lambda rs: selective_advantages(rs, outcome(rs), discount=0.5),
    "global_step": lambda rs: global_step_advantages(rs, outcome(rs)),
    "global_step_penalty": lambda rs: global_step_penalty_advantages(
        rs, outcome(rs), min_steps=2, max_steps=5
    ),
    "min_form": min_form_advantages,
    "prefix": prefix_advantages,
    "prefix_relu": partial(prefix_advantages, relu=True),
    "capo": capo_advantages,
}
RESISTS = {"selective", "selective_half", "prefix", "prefix_relu", "capo"}
BATCH = [
    response(1.0),
    response(0.0),
    response(0.0, (True, True, False, False)),
    response(1.0, group=1),
    response(0.0, group=1),
    response(1.0, group=1, valid=False),
    response(1.0, (True,) * 4),
]


def split_first_step(r: ScoredResponse) -> ScoredResponse:
    """The first step, a correct one, cut in two over the same tokens."""
    spans = (TokenSpan(1, 2), TokenSpan(2, 3), *r.step_spans[1:])
    return replace(r, step_spans=spans, step_labels=(True, *r.step_labels))


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("index", [0, 1, 2, 6])
def test_splitting_a_correct_step_changes_the_total_exactly_where_the_docstring_says(
    name, index
) -> None:
    """Proves it for every response of the batch, not only the one that is split, in successes and
    failures. Does not prove anything about the tokens a policy adds when it really inflates.
    """
    split = [split_first_step(r) if i == index else r for i, r in enumerate(BATCH)]
    before, after = (
        [float(row.double().sum()) for row in DESIGNS[name](batch)] for batch in (BATCH, split)
    )
    if name in RESISTS or (name == "min_form" and False in BATCH[index].step_labels):
        assert after == pytest.approx(before, abs=1e-6)
    else:
        assert abs(after[index] - before[index]) > 1e-4


def test_min_form_keeps_the_first_tokens_credit_when_a_step_is_split() -> None:
    """The sum of the credits is the worst step, however many good ones surround it: what
    min-form does promise.
    """
    for labels in ((1.0, 1.0), (1.0, -1.0, 1.0)):
        rewards_K = torch.tensor(labels, dtype=torch.float64)
        longer_K = torch.cat([torch.ones(1, dtype=torch.float64), rewards_K])
        for credit_K in (min_form_credit(rewards_K), min_form_credit(longer_K)):
            assert float(credit_K.sum()) == pytest.approx(min(labels), abs=1e-7)


def test_golden_selective() -> None:
    """Labels C, I, C, C: with A > 0 the incorrect step loses it, with A < 0 the correct ones do;
    the rest keeps A.
    """
    pair = [response(1.0), response(0.0)]
    good, bad = DESIGNS["selective"](pair)
    assert good.tolist() == [0.5] * 3 + [0.0] + [0.5] * 5
    assert bad.tolist() == [-0.5, 0, 0, -0.5, 0, 0, 0, -0.5, -0.5]
    assert DESIGNS["selective_half"](pair)[1].tolist() == [
        -0.5,
        -0.25,
        -0.25,
        -0.5,
        -0.25,
        -0.25,
        -0.25,
        -0.5,
        -0.5,
    ]


def test_golden_global_step() -> None:
    """Step rewards .25, -.25, .25, .25; z = .5, -1.5, .5, .5 (mean .125, std .25); sums to come 0,
    -.5, 1, .5.
    """
    assert step_rewards(CICC).tolist() == [0.25, -0.25, 0.25, 0.25]
    (row,) = global_step_advantages([response(1.0)], torch.tensor([1.0]))
    assert row.tolist() == pytest.approx(
        [0.8 + 0.2 * z for z in (0, 0, 0, -0.5, 1, 1, 0.5, 0, 0)], abs=1e-5
    )


def test_global_steps_are_normalised_over_the_group_and_not_over_the_batch() -> None:
    """Slime's trap: with groups of different sizes each group's z-scores are those it has alone."""
    sizes = [
        response(1.0),
        response(0.0, (True, False, False, False)),
        *(replace(r, group=1) for r in BATCH[:3]),
    ]
    together = DESIGNS["global_step"](sizes)
    alone = DESIGNS["global_step"](sizes[:2]) + DESIGNS["global_step"](sizes[2:])
    assert all(torch.equal(a, b) for a, b in zip(together, alone))


def test_the_step_penalty_takes_the_step_rewards_and_keeps_the_outcome() -> None:
    """Four steps where at least five are asked for: 0.8 A on every token, and the others' step
    statistics are as if it were absent. Within the bounds it is the plain design.
    """
    odd = response(1.0, (True,) * 5, (*SPANS, TokenSpan(7, 8)))
    batch, outcome_N = [odd, BATCH[0], BATCH[1]], torch.tensor([1.0, 0.5, -1.5])
    for low, high in ((1, 4), (6, 20)):
        rows = global_step_penalty_advantages(batch, outcome_N, min_steps=low, max_steps=high)
        assert rows[0].tolist() == pytest.approx([0.8] * 9)
    inside = global_step_penalty_advantages(batch, outcome_N, min_steps=1, max_steps=4)
    plain = global_step_advantages(batch[1:], outcome_N[1:])
    assert all(torch.equal(a, b) for a, b in zip(inside[1:], plain))
    wide = global_step_penalty_advantages(batch, outcome_N, min_steps=3, max_steps=20)
    assert all(torch.equal(a, b) for a, b in zip(wide, global_step_advantages(batch, outcome_N)))


def test_golden_prefix() -> None:
    """A failed response has 0.5 - mean before its first error and 0 - mean from there; a success is
    untouched.
    """
    good, bad = prefix_advantages([response(1.0), response(0.0)], prefix_reward=0.75)
    assert good.tolist() == [0.5] * 9
    assert bad.tolist() == [0.25] * 3 + [-0.5] * 6
    relu = prefix_advantages(
        [response(1.0), response(1.0), response(0.0)], prefix_reward=0.5, relu=True
    )
    assert relu[2].tolist() == pytest.approx([0.0] * 3 + [-2 / 3] * 6)
    late = prefix_advantages([response(1.0), response(0.0, (True,) * 4)])[1]
    assert late.tolist() == [0.0] * 7 + [-0.5] * 2


def test_golden_capo() -> None:
    """2 y - 1[wrong step] over the 18 tokens of the group, normalised; written out with statistics."""
    import statistics

    raw = [2.0] * 3 + [1.0] + [2.0] * 5 + [0.0] * 3 + [-1.0] + [0.0] * 5
    mean, std = statistics.mean(raw), statistics.stdev(raw)
    rows = torch.cat(capo_advantages([response(1.0), response(0.0)]))
    assert rows.tolist() == pytest.approx([(r - mean) / std for r in raw], abs=1e-5)


def test_golden_min_form() -> None:
    """Against loops: softmax credit at step ends, minus the others' mean per token, summed to come,
    plus leave-one-out verdicts.
    """
    labels = [CICC, (True, True, True, True)]
    credits = []
    for row in labels:
        weights = [math.exp(-(1 if c else -1) / 0.1) for c in row]
        at = [0.0] * 9
        for span, c, w in zip(SPANS, row, weights):
            at[span.end - 1] = (1 if c else -1) * w / sum(weights)
        credits.append(at)
    for i, (y, got) in enumerate(
        zip((0.0, 1.0), min_form_advantages([response(0.0), response(1.0, labels[1])]))
    ):
        other = credits[1 - i]
        expected = [
            (y - (1 - y)) + sum(credits[i][u] - sum(other) / 9 for u in range(t, 9))
            for t in range(9)
        ]
        assert got.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("labels", [(True, False), (True, False, True, True, True), None])
def test_labels_that_do_not_fit_are_dropped_whole(name, labels) -> None:
    """The reference code's defect: raw labels of another count laid over the spans. Here a response
    with too few or too many labels is treated as one with none, so all its tokens but a return's
    get one value.
    """
    odd = DESIGNS[name]([response(0.0, labels), *BATCH[:2]])
    none = DESIGNS[name]([response(0.0, None), *BATCH[:2]])
    assert all(torch.equal(a, b) for a, b in zip(odd, none))
    if name != "min_form":
        assert len(set(odd[0].tolist())) == 1


def test_the_parser_refuses_a_count_mismatch_before_any_of_this() -> None:
    """Why the fallback cannot be reached from a verification: two judged steps for three is a
    failure, not labels.
    """
    text = (
        "## Step 1: a\n**This step is correct.**\n\n## Step 2: b\n**This step is correct.**\n\n"
        "**Verification: Is the answer correct (Yes/No)? Yes**"
    )
    refused = parse_verifier_output(text, "stop", 9, 3)
    assert isinstance(refused, ParseFailure) and "step_count" in refused.reason


@pytest.mark.parametrize("name", DESIGNS)
def test_an_invalid_response_counts_for_nothing(name) -> None:
    """No silent zero in the statistics: with a masked NaN member the others are as if it were
    absent.
    """
    masked = DESIGNS[name]([BATCH[0], response(math.nan, valid=False), BATCH[1]])
    assert masked[1].tolist() == [0.0] * 9
    for got, expected in zip((masked[0], masked[2]), DESIGNS[name](BATCH[:2])):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["min_form", "prefix", "capo"])
def test_a_lone_response_has_nothing_to_learn(name) -> None:
    """One valid member in a group: all zeros."""
    assert DESIGNS[name]([response(1.0)])[0].tolist() == [0.0] * 9
