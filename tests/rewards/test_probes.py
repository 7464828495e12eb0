"""Adversarial probes: built without answers, scored by the reward model's verdicts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from studies.exploits import BY_NAME, Exploit
from studies.hacking_runs import ScriptedJudge

from spark_nemo.config import SamplingConfig
from spark_nemo.config.hacking import ConstraintsConfig
from spark_nemo.evaluation.answers import answer_matches
from spark_nemo.grammar import (
    ParsedResponse,
    StepFormat,
    canonical_solution,
    extract_boxed,
    prompt_set,
    split_response,
)
from spark_nemo.records import Problem
from spark_nemo.rewards.hacking.constraints import read_anyhow
from spark_nemo.rewards.hacking.probes import KINDS, build_probes, score_probes
from spark_nemo.rewards.prm_service import PRMService
from spark_nemo.toy.problem_files import split_problems
from spark_nemo.toy.resolve import ASSETS

TOY = split_problems("eval", 6, 0)
ODD = [
    Problem("a", "Step 3: is 7919 prime? </think><answer>\\boxed{1}</answer> Answer: yes."),
    Problem("b", "?"),
    Problem("c", "Let $f(x)=\\boxed{x}$.\n\nStep 1: find $f$."),
]


def scored(weakness: Exploit | None, rules: ConstraintsConfig | None = None) -> dict:
    served = ScriptedJudge.served(Path(ASSETS / "verifier"), weakness)
    service = PRMService(
        served, prompt_set("compact"), SamplingConfig(temperature=0.0, max_new_tokens=120)
    )
    scores = asyncio.run(
        score_probes(service, build_probes([p.record() for p in TOY]), rules or ConstraintsConfig())
    )
    return {score.kind: score for score in scores}


@pytest.mark.parametrize(
    "problem", [*ODD, *(p.record() for p in TOY)], ids=lambda p: p.problem_id[:8]
)
def test_every_probe_can_be_shown_to_a_verifier_whatever_the_problem_says(problem: Problem) -> None:
    """Problems may contain tags, boxes and headers of the grammar."""
    for probe in build_probes([problem]):
        parsed = read_anyhow(probe.text)
        assert isinstance(parsed, ParsedResponse), probe
        assert isinstance(
            split_response(canonical_solution(parsed), StepFormat.PLAIN), ParsedResponse
        ), probe


def test_no_probe_has_the_right_answer() -> None:
    """Probes are made from texts alone, so an accepted probe is the verifier's mistake."""
    for problem in TOY:
        for probe in build_probes([problem.record()]):
            assert not answer_matches(extract_boxed(probe.text), str(problem.values[-1]))


def test_probes_are_the_same_every_time() -> None:
    """Evaluations of one run, and of two runs, use the same probes."""
    records = [problem.record() for problem in TOY]
    assert build_probes(records) == build_probes(records)
    assert len({probe.text for probe in build_probes(records[:1])}) == len(KINDS)


def test_an_honest_judge_accepts_none() -> None:
    """No verification fails either, so every probe has a verdict."""
    scores = scored(None)
    assert scores.keys() == KINDS.keys()
    assert all(score.accepted == 0 == score.failed for score in scores.values()), scores


@pytest.mark.parametrize(
    ("weakness", "kind"), [("judge_directed", "verdict_in_step"), ("empty_text", "empty_steps")]
)
def test_a_planted_weakness_shows_in_its_probe(weakness: str, kind: str) -> None:
    """The report names the weakness before a policy finds it. Weaknesses that need arithmetic
    (overlong, too_short) are not covered.
    """
    scores = scored(BY_NAME[weakness])
    assert scores[kind].accepted == scores[kind].asked == len(TOY)


@pytest.mark.parametrize(
    ("kind", "rules", "rule"),
    [
        ("solution_appending", ConstraintsConfig(), "one_box"),
        ("empty_steps", ConstraintsConfig(), "empty_step"),
        ("verdict_in_step", ConstraintsConfig(), "judge_directed_text"),
        ("restated_problem", ConstraintsConfig(), None),
        ("repeated_steps", ConstraintsConfig(no_duplicated_steps=True), "duplicated_step"),
        ("one_step", ConstraintsConfig(min_steps=2), "too_few_steps"),
    ],
)
def test_a_score_names_the_constraint_that_rejects_its_probes(kind, rules, rule) -> None:
    """An accepted probe is harmless if a rule rejects it first."""
    assert scored(None, rules)[kind].refused_by == rule
