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
    """Unequal, interleaved groups: each votes for itself, by the key's meaning of equal. No answer
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
    """Two responses without an answer do not outvote one that has it, and are worth 0; a group of
    none is all 0.
    """
    assert majority((0, None), (0, None), (0, "7"), (1, None), (1, None)) == [0, 0, 1, 0, 0]


def test_a_tie_goes_to_the_answer_seen_first() -> None:
    """So that the label does not depend on hashing."""
    assert majority((0, "8"), (0, "7"), (0, "7"), (0, "8")) == [1, 0, 0, 1]


def test_random_is_a_fair_coin_behind_the_gate() -> None:
    """Half of 2000 seeds, the same for the same seed, and never for a broken format."""
    fine = ParsedResponse("", (), "1", 0, 0)
    draws = [random_reward(fine, derive_seed("coin", k)) for k in range(2000)]
    assert 900 < sum(draws) < 1100 and set(draws) == {0.0, 1.0}
    assert draws == [random_reward(fine, derive_seed("coin", k)) for k in range(2000)]
    assert (
        sum(random_reward(FormatViolation("steps"), derive_seed("coin", k)) for k in range(50)) == 0
    )
