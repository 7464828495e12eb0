"""Labelling of solutions from votes, on votes written by hand and on random ones."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_nemo.config import LABEL_METHODS as CONFIGURED_METHODS
from spark_nemo.config import VOTE_METHODS, ConfigError, LabelsConfig
from spark_nemo.records import (
    EngineError,
    LabelledSolution,
    ParseFailure,
    Solution,
    Truncated,
    Verdict,
    Verification,
    count_votes,
    majority,
)
from spark_nemo.verification.labelling import LABEL_METHODS, label_all
from spark_nemo.verification.vote_choice import Dropped, LabelInputs

Y, N = True, False


def solution(key="s"):
    return Solution(
        key=key, problem_id="p", question="q", text="...", finish_reason="stop", num_tokens=3
    )


def votes(*outcomes, key="s"):
    return [
        Verification(f"{key}-{i}", key, i, f"text {i}", outcome, 5)
        for i, outcome in enumerate(outcomes)
    ]


def verdict(steps, answer=None):
    labels = tuple(letter == "C" for letter in steps)
    return Verdict(labels, all(labels) if answer is None else answer)


def label(method, *outcomes, seed=0, **options):
    return apply(method, votes(*outcomes), seed, **options)


def apply(method, given_votes, seed=0, of=None, **options):
    inputs = LabelInputs(of or solution(), given_votes, seed, LabelsConfig(**options))
    return LABEL_METHODS[method](inputs)


verdicts_of_three = st.builds(
    lambda steps, answer: Verdict(tuple(steps), answer),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.booleans(),
)
outcomes = st.lists(
    st.one_of(
        verdicts_of_three,
        st.just(ParseFailure("x")),
        st.just(Truncated(9)),
        st.just(EngineError("x")),
    ),
    max_size=9,
)


def test_the_registry_offers_exactly_the_configured_methods():
    """A method that the configuration accepts exists, and the other way round."""
    assert tuple(LABEL_METHODS) == CONFIGURED_METHODS


def test_failures_are_counted_and_never_vote():
    """Two of five outcomes fail: they appear in the failure counts and in no vote."""
    count = count_votes(
        [verdict("CI"), Truncated(8), verdict("CC"), ParseFailure("no steps"), verdict("IC", Y)]
    )
    assert (count.correct_votes, count.num_votes, count.yes_votes) == ((2, 2), 3, 2)
    assert count.failures == {"truncated": 1, "parse_failure": 1}


def test_verdicts_with_different_step_counts_are_refused():
    """They cannot be votes on one solution: the parser should have returned a ParseFailure."""
    with pytest.raises(ValueError, match=r"\[1, 2\] steps"):
        count_votes([verdict("CC"), verdict("C")])


def test_majority_needs_more_than_half():
    """An even split decides nothing, and neither does an empty vote."""
    assert [majority(0, 0), majority(1, 2), majority(2, 3), majority(1, 3)] == [
        None,
        None,
        True,
        False,
    ]


def test_single_takes_vote_0_and_nothing_else():
    """Only vote 0 counts: a failed one drops the solution even when vote 1 is usable."""
    taken = label("single", verdict("CI"), verdict("CC"), verdict("CC"))
    assert (taken.step_labels, taken.answer_correct, taken.target_text) == ((Y, N), N, "text 0")
    assert (taken.evidence.num_votes, taken.evidence.correct_votes) == (1, (1, 0))
    assert label("single", Truncated(7), verdict("CC")) == Dropped("vote_0_truncated")
    assert apply("single", votes(verdict("C"))[1:]) == Dropped("vote_0_missing")


def test_outcome_consistency_follows_the_final_verdicts():
    """Two of three say No: the target is one of these two, whole, whatever the steps' majorities
    are.
    """
    taken = label("outcome_consistency", verdict("CC"), verdict("CI"), verdict("IC", N))
    assert not taken.answer_correct
    assert (taken.target_text, taken.step_labels) in {("text 1", (Y, N)), ("text 2", (N, Y))}
    assert (taken.evidence.yes_votes, taken.evidence.num_votes, taken.evidence.matching_votes) == (
        1,
        3,
        2,
    )


def test_outcome_tie_is_dropped_or_counted_as_incorrect():
    """One Yes and one No: by default a solution has no label."""
    tied = (verdict("CC"), verdict("CI"))
    assert label("outcome_consistency", *tied) == Dropped("tie")
    assert label("outcome_consistency", *tied, ties="incorrect").target_text == "text 1"


def test_step_consistency_takes_a_whole_verification_that_matches_every_majority():
    """Majorities are C, I, C with three votes for that pattern among five."""
    taken = label(
        "step_consistency",
        verdict("CIC"),
        verdict("CCC"),
        verdict("CIC"),
        verdict("IIC"),
        verdict("CIC"),
    )
    assert (taken.step_labels, taken.answer_correct) == ((Y, N, Y), N)
    assert taken.target_text in {"text 0", "text 2", "text 4"}
    assert (taken.evidence.correct_votes, taken.evidence.matching_votes) == ((4, 1, 5), 3)


def test_step_consistency_never_splices():
    """Majority C C C that no single verification gives: dropped by default, the closest one with
    no_match=hamming.

    The label is then the chosen verification's, so label and target text agree.
    """
    scattered = (verdict("CCI"), verdict("CIC"), verdict("ICC"))
    assert label("step_consistency", *scattered) == Dropped("no_match")
    nearest = label("step_consistency", *scattered, no_match="hamming")
    assert sum(nearest.step_labels) == 2
    assert nearest.evidence.matching_votes == 0


def test_step_tie_is_dropped_or_counted_as_incorrect():
    """A tie on one step alone is enough to drop the solution."""
    tied = (verdict("CC"), verdict("CI"))
    assert label("step_consistency", *tied) == Dropped("tie")
    assert label("step_consistency", *tied, ties="incorrect").step_labels == (Y, N)


def test_step_consistency_target_must_not_contradict_itself():
    """A target that marks an error and ends in Yes is not chosen, unless asked for."""
    contradictory = (verdict("CI", Y), verdict("CI", Y), verdict("CC"))
    assert label("step_consistency", *contradictory) == Dropped("incoherent")
    assert label(
        "step_consistency", *contradictory, require_consistent_verdict=False
    ).answer_correct
    assert label("step_consistency", *contradictory, verdict("CI", N)).evidence.chosen_vote == 3


def test_right_steps_and_a_wrong_answer_are_a_legitimate_label():
    """A solution that stops early: most of the matching verifications say No, so the label does.

    Without such labels a reward model would learn that right steps are all it takes."""
    early = (verdict("CC", N), verdict("CC", N), verdict("CC", Y), verdict("CI"))
    taken = label("step_consistency", *early)
    assert (taken.step_labels, taken.answer_correct, taken.evidence.matching_votes) == (
        (Y, Y),
        N,
        2,
    )
    tied = early[1:]
    assert label("step_consistency", *tied) == Dropped("tie")
    assert not label("step_consistency", *tied, ties="incorrect").answer_correct


def test_the_final_verdicts_of_votes_that_do_not_match_are_not_asked():
    """Each of three verifiers stumbles over another step and says No; the two that match every
    majority say Yes.
    """
    taken = label(
        "step_consistency",
        verdict("ICC"),
        verdict("CIC"),
        verdict("CCI"),
        verdict("CCC"),
        verdict("CCC"),
    )
    assert taken.answer_correct
    assert not label(
        "outcome_consistency", *[verdict(s) for s in ("ICC", "CIC", "CCI", "CCC", "CCC")]
    ).answer_correct


@given(
    outcomes,
    st.sampled_from(VOTE_METHODS),
    st.sampled_from(["drop", "incorrect"]),
    st.sampled_from(["drop", "hamming"]),
    st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_a_label_is_always_one_whole_verification(outcomes, method, ties, no_match, seed):
    """For any votes and options: the label is a given verdict with its own text, and its evidence
    is consistent.
    """
    given_votes = votes(*outcomes)
    result = apply(method, given_votes, seed, ties=ties, no_match=no_match)
    if isinstance(result, Dropped):
        return
    chosen = given_votes[result.evidence.chosen_vote]
    assert chosen.outcome == Verdict(result.step_labels, result.answer_correct)
    assert chosen.text == result.target_text
    assert all(0 <= c <= result.evidence.num_votes for c in result.evidence.correct_votes)
    if method == "step_consistency":
        assert all(result.step_labels) or not result.answer_correct


@given(outcomes, st.sampled_from(VOTE_METHODS), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_label_does_not_depend_on_the_order_of_the_votes(outcomes, method, shuffler):
    """Results that arrive in another order, as they do from a concurrent engine, give the same
    label.
    """
    given_votes = votes(*outcomes)
    shuffled = shuffler.sample(given_votes, len(given_votes))
    assert apply(method, given_votes) == apply(method, shuffled)


def test_the_choice_depends_on_seed_and_solution_and_is_fair():
    """Over 600 solutions three equal verifications are chosen about equally often; another seed
    chooses otherwise.
    """

    def chosen(seed):
        return [
            apply(
                "step_consistency",
                votes(*[verdict("CI")] * 3, key=f"s{i}"),
                seed,
                of=solution(f"s{i}"),
            ).evidence.chosen_vote
            for i in range(600)
        ]

    first = chosen(0)
    assert first == chosen(0) != chosen(1)
    assert all(150 < count < 250 for count in Counter(first).values())


def test_label_all_counts_every_solution_once():
    """Labelled and dropped add up to the number of solutions, one without any verification
    included.
    """
    solutions = [solution(key) for key in "abcd"]
    given_votes = [
        *votes(verdict("C"), verdict("C"), key="a"),
        *votes(verdict("C"), verdict("I"), key="b"),
        *votes(Truncated(1), key="c"),
    ]
    random.Random(0).shuffle(given_votes)
    labelled, dropped = label_all("outcome_consistency", solutions, given_votes, seed=0)
    assert [item.solution.key for item in labelled] == ["a"]
    assert isinstance(labelled[0], LabelledSolution)
    assert dropped == {"tie": 1, "no_votes": 2}


def test_label_all_refuses_what_would_bias_a_vote():
    """A vote counted twice, a vote on an unknown solution, a solution given twice and an unknown
    method are errors.
    """
    one = votes(verdict("C"))
    with pytest.raises(ValueError, match="same vote number"):
        label_all("single", [solution()], one + one, seed=0)
    with pytest.raises(ValueError, match="not given"):
        label_all("single", [], one, seed=0)
    with pytest.raises(ValueError, match="given twice"):
        label_all("single", [solution(), solution()], one, seed=0)
    with pytest.raises(ValueError, match="choose one of single"):
        label_all("best", [solution()], one, seed=0)
    with pytest.raises(ConfigError, match=r"labels\.no_match"):
        LabelsConfig(no_match="splice")


def test_voting_beats_a_single_verification_when_errors_are_independent():
    """The reason for the whole thing: with 15 independent verifiers that are right on each step
    with p = 0.8, step-consistent labels are right more often than single ones. It does not show
    this for a real verifier, whose errors repeat.
    """
    rng = random.Random(3)
    right = Counter()
    for i in range(200):
        truth = (True, True, rng.random() < 0.5)
        outcomes = []
        for _ in range(15):
            steps = tuple(t if rng.random() < 0.8 else not t for t in truth)
            outcomes.append(Verdict(steps, all(steps)))
        for method in ("single", "step_consistency"):
            result = apply(method, votes(*outcomes, key=f"s{i}"), of=solution(f"s{i}"))
            right[method] += not isinstance(result, Dropped) and result.step_labels == truth
    assert right["step_consistency"] > 180 > 130 > right["single"]
