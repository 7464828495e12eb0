"""Filter of labels before training: balance per problem, limits, and agreement of the votes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import labelled

from spark_nemo.config import LabelsConfig
from spark_nemo.verification.label_filter import REASONS, LabelFilter, filter_labels

worlds = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40).map(
    lambda rows: [labelled(f"s{i}", f"p{problem}", yes) for i, (problem, yes) in enumerate(rows)]
)


def per_problem(labels, verdict=lambda label: label.answer_correct):
    return Counter((label.solution.problem_id, verdict(label)) for label in labels)


@given(worlds, st.integers(1, 5), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_what_is_balanced_has_as_many_yes_as_no_of_every_problem(labels, limit, seed):
    """For any labels: equal numbers per problem, never above the limit, never a problem with one
    verdict, nothing kept that was not given, and kept plus removed is what was given.
    """
    selected = filter_labels(labels, LabelFilter(max_per_verdict=limit), seed)
    counts, given_counts = per_problem(selected.kept), per_problem(labels)
    for problem in {label.solution.problem_id for label in labels}:
        shared = min(given_counts[problem, True], given_counts[problem, False])
        assert counts[problem, True] == counts[problem, False] == min(shared, limit)
    assert [label for label in labels if label in selected.kept] == selected.kept
    assert len(selected.kept) + sum(selected.removed.values()) == len(labels)
    assert selected.removed.keys() <= REASONS.keys()


@given(worlds, st.booleans(), st.integers(0, 5), st.randoms())
@settings(max_examples=100, deadline=None)
def test_selection_depends_on_the_labels_and_the_seed_alone(labels, balance, seed, shuffler):
    """Not on the order, and what is kept of one problem not on the others."""
    rules = LabelFilter(balance=balance, max_per_problem=None if balance else 2)
    kept = {label.solution.key for label in filter_labels(labels, rules, seed).kept}
    shuffled = shuffler.sample(labels, len(labels))
    assert kept == {label.solution.key for label in filter_labels(shuffled, rules, seed).kept}
    alone = [label for label in labels if label.solution.problem_id == "p0"]
    assert {label.solution.key for label in filter_labels(alone, rules, seed).kept} == {
        label.solution.key for label in alone if label.solution.key in kept
    }


def test_another_seed_keeps_others_and_every_label_has_its_chance():
    """The choice among nine Yes to balance three No changes with the seed.

    Over 60 seeds each of them is kept at least once.
    """
    labels = [labelled(f"y{i}", "p", True) for i in range(9)] + [
        labelled(f"n{i}", "p", False) for i in range(3)
    ]
    kept = Counter(
        label.solution.key
        for seed in range(60)
        for label in filter_labels(labels, LabelFilter(), seed).kept
    )
    assert all(kept[f"n{i}"] == 60 for i in range(3))
    assert (
        all(5 <= kept[f"y{i}"] <= 40 for i in range(9))
        and sum(kept[f"y{i}"] for i in range(9)) == 180
    )


def test_every_removal_is_counted_under_its_reason():
    """One problem of one verdict, one with a surplus and above the limit."""
    labels = [
        labelled("a", "one_sided", True),
        *(labelled(f"y{i}", "p", True) for i in range(6)),
        *(labelled(f"n{i}", "p", False) for i in range(4)),
    ]
    selected = filter_labels(labels, LabelFilter(max_per_verdict=3), 0)
    assert selected.removed == {"one_sided_problem": 1, "unbalanced": 2, "over_limit": 2}
    assert per_problem(selected.kept) == {("p", True): 3, ("p", False): 3}


def test_ground_truth_balances_what_the_closure_says_and_not_the_labels():
    """The declared baseline: labels that are all Yes are still of two kinds when half of the
    answers are wrong.
    """
    labels = [labelled(f"s{i}", "p", True) for i in range(6)]
    right = {"s0", "s1", "s2", "s3"}
    rules = LabelFilter.from_config(
        LabelsConfig(balance="ground_truth", reference_answers="answers.jsonl"),
        lambda label: label.solution.key in right,
    )
    selected = filter_labels(labels, rules, 0)
    assert per_problem(selected.kept, lambda label: label.solution.key in right) == {
        ("p", True): 2,
        ("p", False): 2,
    }
    assert filter_labels(labels, LabelFilter(), 0).removed == {"one_sided_problem": 6}


def test_answers_and_balancing_go_together():
    """Balancing by consensus takes no checker; balancing by ground truth needs one."""
    with pytest.raises(ValueError, match="only ground_truth"):
        LabelFilter.from_config(LabelsConfig(), lambda label: True)
    with pytest.raises(ValueError, match="only ground_truth"):
        LabelFilter.from_config(
            LabelsConfig(balance="ground_truth", reference_answers="answers.jsonl")
        )


def test_unsure_labels_are_removed_before_the_balance_is_struck():
    """Agreement and entropy look at the weakest step; the rest is balanced among itself."""
    labels = [
        labelled("sure", "p", True),
        labelled("split", "p", True, correct_votes=(8, 5)),
        labelled("no", "p", False, correct_votes=(8, 1)),
    ]
    keep_all = LabelFilter(balance=False)
    assert filter_labels(labels, keep_all, 0).kept == labels
    agreed = filter_labels(labels, LabelFilter(min_agreement=0.7), 0)
    assert {label.solution.key for label in agreed.kept} == {"sure", "no"}
    assert agreed.removed == {"low_agreement": 1}
    entropy = filter_labels(labels, LabelFilter(balance=False, max_entropy=0.5), 0)
    assert ([label.solution.key for label in entropy.kept], entropy.removed) == (
        ["sure"],
        {"high_entropy": 2},
    )


def test_a_limit_without_balance_is_per_problem():
    """Two of each problem stay, whatever they say."""
    labels = [labelled(f"{problem}{i}", problem, True) for problem in "ab" for i in range(5)]
    selected = filter_labels(labels, LabelFilter(balance=False, max_per_problem=2), 1)
    assert (Counter(label.solution.problem_id for label in selected.kept), selected.removed) == (
        {"a": 2, "b": 2},
        {"over_limit": 6},
    )
