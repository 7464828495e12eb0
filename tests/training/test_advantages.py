"""Group-normalised advantages against a loop over groups, and the traps of the field."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark_nemo.training.advantages import STD_EPS, estimate_advantages, group_advantages


def advantages(rewards, groups, valid=None, std_normalize=True):
    valid = [True] * len(rewards) if valid is None else valid
    return group_advantages(
        torch.tensor(rewards), groups, torch.tensor(valid), std_normalize=std_normalize
    ).tolist()


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 3), st.booleans()), max_size=12
    ),
    st.booleans(),
)
def test_equals_a_loop_over_groups(samples, std_normalize):
    """Unequal, interleaved groups with masked members: the same as statistics' mean and stdev group
    by group.
    """
    import statistics

    rewards, groups, valid = ([sample[k] for sample in samples] for k in range(3))
    expected = []
    for reward, group, is_valid in samples:
        members = [r for r, g, v in samples if g == group and v]
        if not is_valid or len(members) < 2:
            expected.append(0.0)
            continue
        scale = statistics.stdev(members) + STD_EPS if std_normalize else 1.0
        expected.append((reward - statistics.mean(members)) / scale)
    got = group_advantages(
        torch.tensor(rewards),
        groups,
        torch.tensor(valid, dtype=torch.bool),
        std_normalize=std_normalize,
    )
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_masked_samples_count_for_nothing():
    """A NaN reward that is masked gives exactly 0 and leaves the others as if it were absent."""
    with_masked = advantages([1.0, math.nan, 0.0, 0.0], [7, 7, 7, 7], [True, False, True, True])
    without = advantages([1.0, 0.0, 0.0], [7, 7, 7])
    assert with_masked[1] == 0.0
    assert [with_masked[i] for i in (0, 2, 3)] == without


def test_groups_go_by_id_not_by_position():
    """The trap of reshaping by a group size: with a filtered group the whole batch would become one
    group.
    """
    assert advantages([1.0, 5.0, 0.0, 7.0, 6.0], [0, 1, 0, 1, 1], std_normalize=False) == [
        0.5,
        -1.0,
        -0.5,
        1.0,
        0.0,
    ]


def test_a_group_without_contrast_gives_exactly_zero():
    """Equal rewards (also ones binary fractions cannot hold), one member, or one valid member:
    nothing to learn.
    """
    assert (
        advantages([0.1, 0.1, 0.1, 1.0, 1.0, 0.0], [0, 0, 0, 1, 2, 2], [True] * 5 + [False])
        == [0.0] * 6
    )


def test_a_valid_reward_must_be_a_number():
    """An unmasked NaN would poison its whole group."""
    with pytest.raises(ValueError, match="not finite"):
        advantages([1.0, math.nan], [0, 0])


def naive_advantage(estimator, i, samples):
    """One sample's advantage by the estimator's definition, in plain Python."""
    import statistics

    reward, group, is_valid = samples[i]
    peers = [
        r
        for j, (r, g, v) in enumerate(samples)
        if v and (g == group or estimator == "reinforce_pp") and j != i
    ]
    if not is_valid or not peers:
        return 0.0
    members = [reward, *peers]
    match estimator:
        case "rloo":
            return reward - statistics.mean(peers)
        case "dr_grpo":
            return reward - statistics.mean(members)
    return (reward - statistics.mean(members)) / (statistics.stdev(members) + STD_EPS)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 3), st.booleans()), max_size=12
    )
)
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_every_estimator_equals_its_definition(estimator, samples):
    """Unequal, interleaved groups with masked members; the masked rewards are NaN."""
    rewards = [reward if valid else math.nan for reward, _, valid in samples]
    got = estimate_advantages(
        estimator,
        torch.tensor(rewards),
        [g for _, g, _ in samples],
        torch.tensor([v for _, _, v in samples], dtype=torch.bool),
    )
    expected = [naive_advantage(estimator, i, samples) for i in range(len(samples))]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_estimators_are_related_as_their_formulas_say():
    """In a group of 3: RLOO is 3/2 of Dr.GRPO. Only REINFORCE++ lets one prompt's rewards move
    another's advantages.
    """
    rewards_N, groups, valid_N = (
        torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]),
        [0, 0, 0, 1, 1],
        torch.ones(5),
    )
    rloo, centred, batch = (
        estimate_advantages(name, rewards_N, groups, valid_N)
        for name in ("rloo", "dr_grpo", "reinforce_pp")
    )
    torch.testing.assert_close(rloo[:3], 1.5 * centred[:3])
    assert centred[3:].tolist() == [0.0, 0.0]
    assert (batch[3:] > 0).all()
