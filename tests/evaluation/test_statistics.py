"""Bootstrap intervals, accuracies over samples, and label quality."""

from itertools import combinations

import numpy as np
import pytest

from spark_nemo.evaluation import (
    GradedSample,
    f1_difference,
    f1_estimate,
    label_quality,
    mean_accuracy,
    mean_difference,
    mean_estimate,
    ratio_estimate,
    score_processbench,
)
from spark_nemo.evaluation.accuracy import greedy_values, majority_values, pass_at_k_values
from spark_nemo.records import LabelEvidence, LabelledSolution, Solution


def graded(table):
    """Make samples from marks: {"p": "10/xy"} is two samples of problem p, the first correct.

    The letters after the slash are their answers, a dash is a missing answer.
    """
    rows = []
    for problem, spec in table.items():
        marks, _, answers = spec.partition("/")
        for k, mark in enumerate(marks):
            answer = answers[k : k + 1].strip("-") or None
            rows.append(GradedSample(problem, k, mark == "1", answer))
    return rows


def test_the_interval_of_a_mean_is_close_to_the_textbook_one():
    """400 fair coins have a half-width of 1.96 * 0.5 / 20."""
    values = np.arange(400) % 2
    estimate = mean_estimate(values, samples=4000)
    assert estimate.value == 0.5
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.06)
    assert (
        estimate
        == mean_estimate(values, samples=4000)
        != mean_estimate(values, samples=4000, seed=1)
    )


def test_the_interval_covers_the_truth_about_as_often_as_its_level():
    """A 95% interval contains the known mean in 88% to 99% of 200 experiments."""
    rng = np.random.default_rng(1)
    covered = sum(
        e.low <= 0.3 <= e.high
        for e in (mean_estimate(rng.random(100) < 0.3, samples=400, seed=i) for i in range(200))
    )
    assert 176 <= covered <= 198


def test_pairing_narrows_the_interval_of_a_difference():
    """Two models err on the same cases: the paired interval excludes 0, separate ones overlap."""
    rng = np.random.default_rng(0)
    worse = rng.random(300) < 0.6
    better = worse | (rng.random(300) < 0.1)
    difference = mean_difference(better, worse)
    assert 0 < difference.low <= difference.value <= difference.high
    assert mean_estimate(better).low < mean_estimate(worse).high
    with pytest.raises(ValueError, match="must be the same"):
        mean_difference([1], [1, 0])


def test_a_ratio_resamples_whole_units():
    """Steps of one solution are correlated, so the interval is wider than for independent steps."""
    steps, right = np.full(50, 10), np.array([10, 0] * 25)
    clustered = ratio_estimate(right, steps)
    independent = mean_estimate(np.repeat([1, 0], 250))
    assert clustered.value == independent.value == 0.5
    assert clustered.high - clustered.low > 2 * (independent.high - independent.low)


def f1_differences_case_by_case(labels, a, b, samples, seed):
    """The same bootstrap by drawing the cases one by one, as a reference."""
    labels, a, b = np.array(labels), np.array(a), np.array(b)
    rng, out = np.random.default_rng(seed), []
    error, correct = np.flatnonzero(labels != -1), np.flatnonzero(labels == -1)
    for _ in range(samples):
        drawn = np.concatenate([rng.choice(error, len(error)), rng.choice(correct, len(correct))])
        out.append(
            score_processbench(labels[drawn], a[drawn]).f1
            - score_processbench(labels[drawn], b[drawn]).f1
        )
    return np.quantile(out, [0.025, 0.975])


def test_the_paired_f1_bootstrap_equals_one_that_draws_cases():
    """The multinomial shortcut gives the same interval up to the noise of 3000 resamples."""
    rng = np.random.default_rng(2)
    labels = [-1] * 60 + [int(x) for x in rng.integers(0, 4, 80)]
    a = [label if rng.random() < 0.7 else 9 for label in labels]
    b = [label if rng.random() < 0.5 else 9 for label in labels]
    first, second = score_processbench(labels, a), score_processbench(labels, b)
    difference = f1_difference([first.hits], [second.hits], samples=3000)
    assert difference.value == pytest.approx(first.f1 - second.f1)
    assert difference[1:] == pytest.approx(
        f1_differences_case_by_case(labels, a, b, 3000, 5), abs=0.015
    )
    same = f1_difference([first.hits], [first.hits])
    assert tuple(same) == (0, 0, 0)


def test_f1_estimate_averages_splits():
    """The value is the mean of the splits' F1 and is inside its interval."""
    one = score_processbench([-1, -1, 0, 0], [-1, 0, 0, None])
    two = score_processbench([-1, 2], [-1, 2])
    estimate = f1_estimate([one.hits, two.hits])
    assert estimate.value == pytest.approx((one.f1 + two.f1) / 2)
    assert estimate.low <= estimate.value <= estimate.high
    with pytest.raises(ValueError, match="same cases"):
        f1_difference([one.hits], [two.hits])


def test_avg_at_k_is_the_mean_of_the_problems():
    """Two problems with 1 of 2 and 2 of 2; an uneven table is an error, greedy takes one sample."""
    assert mean_accuracy(graded({"a": "10", "b": "11"})).value == 0.75
    assert greedy_values(graded({"a": "1", "b": "0"})) == {"a": True, "b": False}
    with pytest.raises(ValueError, match="same number of samples"):
        mean_accuracy(graded({"a": "10", "b": "1"}))
    with pytest.raises(ValueError, match="takes one"):
        greedy_values(graded({"a": "10"}))
    with pytest.raises(ValueError, match="same number"):
        mean_accuracy(graded({"a": "1"}) + graded({"a": "0"}))


@pytest.mark.parametrize("marks", ["00000", "10000", "11000", "11110", "11111"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_counts_all_subsets(marks, k):
    """Equal to drawing every subset of k samples and asking whether one is right."""
    subsets = list(combinations(marks, k))
    expected = sum("1" in subset for subset in subsets) / len(subsets)
    assert pass_at_k_values(graded({"p": marks}), k)["p"] == pytest.approx(expected)


def test_majority_at_k():
    """The most frequent answer of the first k decides.

    Samples without an answer do not vote, the first seen wins a tie, and no votes is wrong.
    """
    assert majority_values(graded({"p": "011/xyy"}), 3) == {"p": True}
    assert majority_values(graded({"p": "011/xyy"}), 2) == {"p": False}
    assert majority_values(graded({"p": "0001/---y"}), 4) == {"p": True}
    assert majority_values(graded({"p": "00/--"}), 2) == {"p": False}
    with pytest.raises(ValueError, match="maj@3"):
        majority_values(graded({"p": "00/--"}), 3)


def labelled(key, labels):
    solution = Solution(key, "p", "q", "t", "stop", 1)
    return LabelledSolution(
        "single", solution, tuple(labels), all(labels), "t", LabelEvidence((), 1, 1, 0, 1)
    )


def test_label_quality_counts_steps_first_errors_and_what_was_kept():
    """Three of four solutions kept, with 6 of 7 steps correct and every first error."""
    truths = {"a": [1, 0, 0], "b": [1, 1], "c": [0, 0], "d": [1]}
    quality = label_quality(
        [labelled("a", [1, 0, 1]), labelled("b", [1, 1]), labelled("c", [0, 0])], truths
    )
    assert quality.step_accuracy.value == pytest.approx(6 / 7)
    assert quality.first_error_accuracy.value == 1
    assert quality.share_kept == 0.75
    quality = label_quality([labelled("b", [1, 0])], truths)
    assert (quality.step_accuracy.value, quality.first_error_accuracy.value) == (0.5, 0)


def test_label_quality_rejects_labels_that_do_not_match_their_truth():
    """A label without a truth, or with another number of steps, is an error; none kept is not 0."""
    with pytest.raises(ValueError, match="no true step labels"):
        label_quality([labelled("x", [1])], {"a": [1]})
    with pytest.raises(ValueError, match="1 labelled steps, 2 true"):
        label_quality([labelled("a", [1])], {"a": [1, 0]})
    assert label_quality([], {"a": [1]}).step_accuracy is None
