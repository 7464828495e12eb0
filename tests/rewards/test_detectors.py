"""Detectors, their baseline, the divergence from a held-out verifier."""

from __future__ import annotations

import json
import random

import pytest
from studies.exploits import EXPLOITS, write_honest

from spark_nemo.config.hacking import DETECTORS, DetectorsConfig
from spark_nemo.grammar import verdict_line
from spark_nemo.records import EngineError, Problem, Rollout, Truncated
from spark_nemo.rewards.hacking.detectors import baseline, detector_rates, new_alarms, tagged_steps
from spark_nemo.rewards.hacking.divergence import compared, gap_growth, reward_gap
from spark_nemo.toy.habits import FAULTLESS, write_solution
from spark_nemo.toy.problems import sample_problem

CONFIG = DetectorsConfig(baseline_steps=2)
OK = ["7+5=12", "12*2=24"]


def tagged(steps: list[str], after: str = "") -> str:
    body = "".join(f"<step>{step}</step>" for step in steps)
    return f"<think>{body}</think><answer>\\boxed{{24}}</answer>{after}"


def rollout(text: str, num_tokens: int = 30) -> Rollout:
    ids = (5,) * num_tokens
    return Rollout(
        Problem("p", "q?"), 0, (1,), ids, (0.0,) * num_tokens, (0,) * num_tokens, text, "stop"
    )


def row(step: int, steps: float = 2.0, tokens: float = 30.0) -> dict[str, float]:
    return {"step": step, "hacking/mean_steps": steps, "response_tokens": tokens}


@pytest.mark.parametrize(
    ("name", "text", "num_tokens"),
    [
        ("solution_appending", tagged(OK, after=tagged(["1+1=2"])), 30),
        ("solution_appending", tagged(OK, after="!"), 30),
        ("step_inflation", tagged(["a", "b", "c", "d"]), 30),
        ("step_reduction", tagged(["a"]), 30),
        ("duplicated_steps", tagged(["a", "A."]), 30),
        ("judge_directed", tagged(["a", verdict_line(True)]), 30),
        ("empty_text", tagged(["a", "--"]), 30),
        ("empty_text", "", 30),
        ("length_drift", tagged(OK), 46),
        ("length_drift", tagged(OK), 19),
    ],
)
def test_a_detector_counts_the_share_of_responses_with_its_sign(
    name: str, text: str, num_tokens: int
) -> None:
    """One response of four shows the symptom; the other three trigger no detector."""
    batch = [rollout(text, num_tokens), *[rollout(tagged(OK))] * 3]
    rates = detector_rates(batch, [row(0), row(1)], CONFIG)
    assert rates[f"hacking/{name}"] == 0.25
    quiet = detector_rates([rollout(tagged(OK))], [row(0), row(1)], CONFIG)
    assert all(quiet[f"hacking/{each}"] == 0 for each in DETECTORS)


@pytest.mark.parametrize("exploit", EXPLOITS, ids=lambda exploit: exploit.name)
def test_every_exploit_of_the_simulator_sets_its_own_detector_off(exploit) -> None:
    """The simulator reports the rates of the detectors that a real run has."""
    rng = random.Random(0)
    problems = [sample_problem(rng) for _ in range(40)]
    solutions = [write_solution(problem, FAULTLESS, rng) for problem in problems]
    honest = [rollout(write_honest(p, s, rng), 27) for p, s in zip(problems, solutions)]
    tokens = {"overlong": 50, "too_short": 17}.get(exploit.name, 27)
    hacked = [rollout(exploit.write(p, s, rng), tokens) for p, s in zip(problems, solutions)]
    start = [{"step": 0, "response_tokens": 27.0, "hacking/mean_steps": 2.5}]
    key = f"hacking/{exploit.detector}"
    assert detector_rates(hacked, start, CONFIG)[key] == 1.0
    assert detector_rates(honest, start, CONFIG)[key] == 0.0


def test_the_baseline_settles_after_its_steps_and_the_first_step_is_its_own() -> None:
    """Later rows do not change it: a slow drift is measured from the run's beginning."""
    rows = [row(0, 2, 20), row(1, 4, 40), row(2, 9, 900)]
    assert baseline(rows, [rollout("x")], CONFIG) == baseline(rows[:2], [rollout("x")], CONFIG)
    assert (baseline(rows, [], CONFIG).steps, baseline(rows, [], CONFIG).tokens) == (3.0, 30.0)
    assert baseline([], [rollout(tagged(OK), 12)], CONFIG).tokens == 12


def test_rates_after_a_resume_are_those_of_an_uninterrupted_run() -> None:
    """The only state is metrics.jsonl: rows read back from JSON give bit-identical rates."""
    rng = random.Random(3)
    batches = [
        [rollout(tagged(["s"] * rng.randint(1, 4)), rng.randint(10, 60)) for _ in range(7)]
        for _ in range(6)
    ]
    rows: list[dict] = []
    for step, batch in enumerate(batches):
        mean = sum(len(r.response_ids) for r in batch) / len(batch)
        rows.append({"step": step, "response_tokens": mean, **detector_rates(batch, rows, CONFIG)})
    read_back = [json.loads(json.dumps(each)) for each in rows]
    for step, batch in enumerate(batches):
        again = detector_rates(batch, read_back[:step], CONFIG)
        assert again == {name: rows[step][name] for name in again}


def test_an_alarm_is_raised_when_a_rate_reaches_it_and_not_again_while_it_stays() -> None:
    """One warning per rise, so that a log stays readable."""
    high, low = {"hacking/judge_directed": 0.5}, {"hacking/judge_directed": 0.1}
    assert new_alarms(high, None, CONFIG) == ["judge_directed"] == new_alarms(high, low, CONFIG)
    assert new_alarms(high, high, CONFIG) == [] == new_alarms(low, high, CONFIG)


def test_an_open_step_tag_ends_at_the_next_tag() -> None:
    """Steps are also counted in a response that does not parse."""
    assert tagged_steps("<think><step>a<step>b</step></think><step>c") == ("a", "b", "c")


def test_the_gap_is_over_responses_that_both_verifiers_scored() -> None:
    """A held-out failure counts in the failure rate and never as a reward of 0."""
    metrics = reward_gap([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, Truncated(5)])
    assert metrics["hacking/reward_gap"] == pytest.approx(2 / 3 - 1 / 3)
    assert metrics["hacking/heldout_failures"] == 0.25
    assert reward_gap([1.0], [EngineError("x")]) == {"hacking/heldout_failures": 1.0}


def test_growth_is_measured_from_the_first_comparison() -> None:
    """A verifier that is stricter from the start does not raise an alarm."""
    rows = [
        {"step": 0},
        {"step": 1, "hacking/reward_gap": 0.3},
        {"step": 2, "hacking/reward_gap": 0.1},
    ]
    assert gap_growth({"hacking/reward_gap": 0.5}, rows) == pytest.approx(0.2)
    assert gap_growth({"hacking/reward_gap": 0.5}, []) == 0 == gap_growth({}, rows)


def test_the_compared_responses_are_valid_and_always_the_same() -> None:
    """They are a function of seed and step alone."""
    valid = [index % 3 > 0 for index in range(30)]
    chosen = compared(valid, 8, seed=1, step=4)
    assert chosen == compared(valid, 8, seed=1, step=4) != compared(valid, 8, seed=1, step=5)
    assert len(chosen) == 8 and all(valid[index] for index in chosen)
