"""Process-aware reward, and the policies for a missing verdict."""

import json
import math

import pytest

from spark_nemo.config.reward import MaskFailures, PenalizeFailures
from spark_nemo.records import (
    EngineError,
    FormatViolation,
    ParseFailure,
    Problem,
    Rollout,
    Truncated,
    Verdict,
)
from spark_nemo.rewards import (
    FailureCount,
    FailureRateExceeded,
    apply_failure_policy,
    process_aware_reward,
    rlvr_rewards,
)

YES = Verdict((True, True), True)
NO = Verdict((True, False), False)


def test_process_aware_is_the_gate_times_the_verdict():
    """All cases of r = f * y; parsing of verdicts is not tested here."""
    broken = FormatViolation("two boxes")
    assert process_aware_reward(None, YES) == 1.0
    assert process_aware_reward(None, NO) == 0.0
    assert process_aware_reward(broken, YES) == 0.0
    assert process_aware_reward(broken, None) == 0.0
    assert process_aware_reward(None, broken) == 0.0


def test_the_gate_decides_even_if_the_verifier_failed():
    """A format violation has reward 0 by definition, without a verdict."""
    assert process_aware_reward(FormatViolation("no answer"), Truncated(5)) == 0.0


@pytest.mark.parametrize("failure", [ParseFailure("no line"), Truncated(9), EngineError("gone")])
def test_a_missing_verdict_stays_a_failure(failure):
    """A failure never becomes a number here."""
    assert process_aware_reward(None, failure) is failure


def test_a_well_formed_response_must_have_been_verified():
    """A missing verification is a bug of the caller, not a reward of 0."""
    with pytest.raises(ValueError, match="not verified"):
        process_aware_reward(None, None)


def test_mask_leaves_failures_out_and_reports_their_rates():
    """Masked rewards are NaN and not valid; rates are per kind, as shares of the verifications."""
    scores = [1.0, Truncated(9), 0.0, ParseFailure("x"), 0.0, 1.0]
    batch = apply_failure_policy(scores, MaskFailures(max_rate=0.5), num_verifications=5)
    assert batch.valid == (True, False, True, False, True, True)
    assert [reward for reward, valid in zip(batch.rewards, batch.valid) if valid] == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]
    assert all(math.isnan(batch.rewards[i]) for i in (1, 3))
    assert batch.failure_rates == {"parse_failure": 0.2, "truncated": 0.2}
    assert batch.failure_rate == pytest.approx(0.4)


def test_penalize_gives_the_declared_number():
    """Only the configuration can turn a failure into a reward."""
    policy = PenalizeFailures(penalty=-0.25, max_rate=1.0)
    batch = apply_failure_policy([Truncated(9), 1.0], policy)
    assert batch.rewards == (-0.25, 1.0)
    assert batch.valid == (True, True)


def test_too_many_failures_stop_the_run():
    """One line that names the rate, the bound, the dominant kind and the field; a rate at the bound
    still passes.
    """
    scores = [Truncated(9), Truncated(9), ParseFailure("x"), 1.0]
    FailureCount().add(scores, 4, 0.75)
    with pytest.raises(FailureRateExceeded) as error:
        FailureCount().add(scores, 4, 0.5)
    for part in ("75.0%", "0.5", "truncated: 2", "rl.reward.failures.max_rate"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


LOST = EngineError("gone")


def test_one_failure_among_few_verifications_does_not_stop_a_run():
    """With a maximum rate of 0.2, steps with fewer than five verifications are pooled with later
    steps. Checked verifications do not count in the next check.
    """
    count = FailureCount()
    count.add([LOST, 1.0], 2, 0.2)
    count.add([1.0, 1.0], 2, 0.2)
    count.add([1.0], 1, 0.2)
    count.add([LOST, 0.0, 0.0], 1, 0.2)
    assert (count.failed.total(), count.total, count.waiting_failed.total(), count.waiting) == (
        2,
        6,
        1,
        1,
    )
    with pytest.raises(FailureRateExceeded, match=r"40\.0% of 5"):
        count.add([LOST, 1.0, 1.0, 1.0], 4, 0.2)


def test_at_the_end_the_whole_run_is_judged_however_short_it_was():
    """A pooled failure is checked at the run's end. With a bound of 0 every step is checked."""
    count = FailureCount()
    count.add([LOST, 1.0], 2, 0.2)
    with pytest.raises(FailureRateExceeded, match=r"50\.0% of 2"):
        count.finish(0.2)
    count.finish(0.5)
    with pytest.raises(FailureRateExceeded):
        FailureCount().add([LOST, 1.0], 2, 0.0)


def test_a_resumed_run_counts_on():
    """Counts restored from a checkpoint's JSON lead to the same check as an uninterrupted run."""
    count = FailureCount()
    count.add([LOST, 1.0], 2, 0.2)
    resumed = FailureCount.from_json(json.loads(json.dumps(count.to_json())))
    assert resumed == count
    with pytest.raises(FailureRateExceeded, match=r"40\.0% of 5"):
        resumed.add([LOST, 1.0, 1.0], 3, 0.2)


def test_the_format_gate_does_not_dilute_the_failure_rate():
    """Four gated responses, and two failures among four verifications: the rate is 1/2, not 1/4."""
    scores = [0.0] * 4 + [LOST, LOST, 1.0, 1.0]
    assert apply_failure_policy(scores, MaskFailures(), num_verifications=4).failure_rate == 0.5
    with pytest.raises(FailureRateExceeded, match=r"50\.0% of 4"):
        FailureCount().add(scores, 4, 0.4)


def test_no_verification_at_all_is_no_failure():
    """A step with only format violations does not divide by zero."""
    batch = apply_failure_policy([0.0, 0.0], MaskFailures(), num_verifications=0)
    assert batch.failure_rate == 0.0
    assert batch.valid == (True, True)


def test_rlvr_asks_the_checker_by_problem():
    """The reward does not hold answers: it passes id and text to the checker."""
    rollout = Rollout(Problem("p1", "1+1?"), 0, (1,), (2,), (-0.1,), (0,), "two", "stop")
    late = EngineError("answer checker: late")
    asked = []
    assert rlvr_rewards(
        [rollout] * 3, lambda shown: asked.extend(shown) or [True, False, late]
    ) == [1.0, 0.0, late]
    assert asked == [("p1", "two")] * 3
