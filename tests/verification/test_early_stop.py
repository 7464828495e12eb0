"""Stopping rules, against brute force and against definitions written down a second time."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_nemo.config import ConfigError, Stage1Config
from spark_nemo.records import Outcome, Truncated, Verdict, count_votes, majority
from spark_nemo.verification.early_stop import (
    StoppingRule,
    change_probability,
    settled_probably,
    votes_taken,
)

FAILED = Truncated(9)


def verdict(*steps: bool, yes: bool = True) -> Verdict:
    return Verdict(steps, yes)


def sequential_or_exact(error: float | None, vote_batch_size: int = 1) -> StoppingRule:
    """The rule for 16 votes: exact without ``error``."""
    if error is None:
        return StoppingRule(16, vote_batch_size=vote_batch_size)
    return StoppingRule(16, partial(settled_probably, error=error), vote_batch_size)


def majorities(outcomes: list[Outcome], with_verdict: bool, num_steps: int) -> list[bool | None]:
    count = count_votes(outcomes)
    steps = [majority(votes, count.num_votes) for votes in count.correct_votes] or [
        None
    ] * num_steps
    return [*steps, majority(count.yes_votes, count.num_votes)] if with_verdict else steps


@pytest.mark.parametrize("with_verdict", [False, True])
@pytest.mark.parametrize(("num_votes", "num_steps"), [(1, 1), (2, 1), (5, 1), (6, 1), (4, 2)])
def test_exact_rule_stops_when_and_only_when_nothing_can_change(
    num_votes: int,
    num_steps: int,
    with_verdict: bool,
) -> None:
    """Proves by going through every sequence that the exact rule never errs, and never waits for a
    vote too many.

    Ties count as a majority of their own; verdicts and failures are in any order. Waves of one
    vote.
    """
    rule = StoppingRule(num_votes, with_verdict=with_verdict)
    said = [FAILED] + [
        verdict(*steps, yes=yes)
        for steps in itertools.product((True, False), repeat=num_steps)
        for yes in ((True, False) if with_verdict else (True,))
    ]
    for taken in range(num_votes + 1):
        for so_far in itertools.product(said, repeat=taken):
            now = majorities(list(so_far), with_verdict, num_steps)
            ends = (
                majorities([*so_far, *rest], with_verdict, num_steps)
                for rest in itertools.product(said, repeat=num_votes - taken)
            )
            assert (rule.next_batch(so_far) == 0) == all(end == now for end in ends)


def sequences(num_votes: int) -> st.SearchStrategy[list[Outcome]]:
    vote = st.one_of(
        st.just(FAILED), st.builds(verdict, st.booleans(), st.booleans(), yes=st.booleans())
    )
    biased = st.builds(verdict, st.just(True), st.sampled_from([True, True, True, False]))
    return st.lists(st.one_of(vote, biased), min_size=num_votes, max_size=num_votes)


@given(sequences(16), st.sampled_from([None, 0.01, 0.05, 0.2]))
def test_a_wave_holds_no_vote_that_asking_one_by_one_would_spare(
    outcomes: list[Outcome], error: float | None
) -> None:
    """Proves that waves of size 1, which are longer where a decision is far, stop at the first
    decided vote.
    """
    rule = sequential_or_exact(error)
    one_by_one = next(taken for taken in range(17) if rule.next_batch(outcomes[:taken]) == 0)
    assert votes_taken(rule, outcomes) == one_by_one


@given(sequences(16), st.sampled_from([None, 0.05]), st.integers(2, 6))
def test_longer_waves_cost_less_than_a_wave_more(
    outcomes: list[Outcome], error: float | None, size: int
) -> None:
    """``vote_batch_size`` changes the cost: the same decision, at most ``size - 1`` votes later.

    For the exact rule only: under the sequential test later votes may open again what was decided.
    """
    one, many = (
        votes_taken(sequential_or_exact(error), outcomes),
        votes_taken(sequential_or_exact(error, size), outcomes),
    )
    assert many >= one
    if error is None:
        assert many <= one + size - 1


@pytest.mark.parametrize("votes", [(0, 0), (1, 0), (3, 1), (2, 2), (0, 5)])
@pytest.mark.parametrize("remaining", [0, 1, 2, 7])
def test_change_probability_is_that_of_the_urn(votes: tuple[int, int], remaining: int) -> None:
    """Proves the closed form: adding votes one by one, each like a ball from Polya's urn, gives the
    same figure.
    """

    def changed(votes_for: int, against: int, left: int) -> Fraction:
        if left == 0:
            return Fraction(int(sign(votes_for - against) != sign(votes[0] - votes[1])))
        for_next = (votes_for + Fraction(1, 2)) / (votes_for + against + 1)
        return for_next * changed(votes_for + 1, against, left - 1) + (1 - for_next) * changed(
            votes_for, against + 1, left - 1
        )

    assert change_probability(*votes, remaining) == pytest.approx(
        float(changed(*votes, remaining)), abs=1e-12
    )


def test_the_sequential_error_is_kept_on_average_over_its_prior() -> None:
    """Proves calibration where the prior holds: of 4,000 steps, no more change than the configured
    error.

    Says nothing about verifiers unlike the prior; ``benchmarks/early_stop.py`` measures one.
    """
    draw, rule = random.Random(0), sequential_or_exact(0.05)
    changed = saved = 0
    for _ in range(4000):
        rate = draw.betavariate(0.5, 0.5)
        outcomes = [verdict(draw.random() < rate) for _ in range(16)]
        taken = votes_taken(rule, outcomes)
        saved += 16 - taken
        changed += majorities(outcomes, False, 1) != majorities(outcomes[:taken], False, 1)
    assert 0 < changed <= 0.05 * 4000
    assert saved > 0.5 * 16 * 4000


def test_knobs_without_effect_are_refused() -> None:
    """An error bound without the sequential test, waves without stopping, and stopping where it
    cannot happen.
    """
    for knobs, said in (
        ({"early_stop_error": 0.1}, "stage1.early_stop_error=0.1 has no effect"),
        (
            {"early_stop": "exact", "early_stop_error": 0.1},
            "stage1.early_stop_error=0.1 has no effect",
        ),
        ({"vote_batch_size": 2}, "stage1.vote_batch_size=2 has no effect"),
        ({"early_stop_verdict": True}, "stage1.early_stop_verdict=true has no effect"),
        (
            {"early_stop": "exact", "verifications_per_solution": 2},
            "stage1.early_stop=exact has no effect",
        ),
        ({"early_stop": "sequential"}, "needs stage1.early_stop_error"),
        ({"early_stop": "sequential", "early_stop_error": 0.5}, "must lie between"),
        ({"max_requests_in_flight": 0}, "must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            Stage1Config(**knobs)


def sign(value: int) -> int:
    return (value > 0) - (value < 0)
