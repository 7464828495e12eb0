"""The baselines without a reward model."""

from __future__ import annotations

from spark_nemo.grammar import ParsedResponse
from spark_nemo.records import FormatViolation, Problem, Rollout, derive_seed
from spark_nemo.rewards import majority_rewards, random_reward


def rollout(group: int, text: str) -> Rollout:
    return Rollout(Problem(f"p{group}", "?"), group, (1,), (2,), (-1.0,), (0,), text, "stop")


def majority(*answers: tuple[int, str | None]) -> list[float]:
    """Rewards of responses given by (group, boxed answer or None)."""
    return majority_rewards(
        [rollout(g, "none" if a is None else rf"\boxed{{{a}}}") for g, a in answers],
        lambda answer: answer.strip("$"),
    )


def test_the_groups_own_majority_is_the_label() -> None:
    """Unequal, interleaved groups vote separately, with the key's equality of answers. No answer
    key is involved.
    """
    assert majority((0, "7"), (1, "3"), (0, "$7$"), (0, "8"), (1, "4"), (1, "4")) == [
        1,
        0,
        1,
        0,
        1,
        1,
    ]


def test_no_answer_has_no_vote() -> None:
    """Two responses without an answer do not outvote one with an answer, and have reward 0; a group
    without any answer has only zeros.
    """
    assert majority((0, None), (0, None), (0, "7"), (1, None), (1, None)) == [0, 0, 1, 0, 0]


def test_a_tie_goes_to_the_answer_seen_first() -> None:
    """The label does not depend on the order of hashes."""
    assert majority((0, "8"), (0, "7"), (0, "7"), (0, "8")) == [1, 0, 0, 1]


def test_random_is_a_fair_coin_behind_the_gate() -> None:
    """About half of 2000 seeds give 1, equal seeds agree, and a format violation always gives 0."""
    fine = ParsedResponse("", (), "1", 0, 0)
    draws = [random_reward(fine, derive_seed("coin", k)) for k in range(2000)]
    assert 900 < sum(draws) < 1100 and set(draws) == {0.0, 1.0}
    assert draws == [random_reward(fine, derive_seed("coin", k)) for k in range(2000)]
    assert (
        sum(random_reward(FormatViolation("steps"), derive_seed("coin", k)) for k in range(50)) == 0
    )
