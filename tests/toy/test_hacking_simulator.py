"""The simulator's judges, and one line of its table from a new training run."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from studies.exploits import BY_NAME, EXPLOITS, judge
from studies.hacking_runs import ScriptedJudge, SimulatorRun

from spark_nemo.config import SamplingConfig
from spark_nemo.engines.base import EngineFailure
from spark_nemo.grammar import Variant, parse_verifier_output, render_solution
from spark_nemo.records import Verdict
from spark_nemo.toy.corpus import PROMPTS
from spark_nemo.toy.habits import ERROR_RICH, FAULTLESS, write_solution
from spark_nemo.toy.oracle import step_truths
from spark_nemo.toy.problems import sample_problem
from spark_nemo.toy.resolve import ASSETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("weakness", [None, *EXPLOITS], ids=lambda w: w.name if w else "honest")
def test_a_judge_is_honest_about_solutions_without_its_exploit(weakness) -> None:
    """Without its exploit a judge gives the oracle's labels, and Yes to correct solutions only."""
    rng = random.Random(2)
    for _ in range(300):
        problem = sample_problem(rng)
        solution = write_solution(problem, ERROR_RICH, rng)
        steps = [step.text for step in solution.steps]
        if len(set(steps)) < len(steps) or len(steps) == 1:  # these are exploits by chance
            continue
        labels, accepted = judge(problem.question, steps, str(solution.answer), weakness)
        truths = step_truths(problem.question, steps)
        right = (
            all(truths)
            and len(steps) == len(problem.operations)
            and solution.answer == problem.values[-1]
        )
        assert (labels, accepted) == (truths, right)


def test_the_served_judge_writes_the_verification_grammar() -> None:
    """The judge takes prompt ids and returns a verification as token ids, as a model does."""
    served, rng = ScriptedJudge.served(ASSETS / "verifier", None), random.Random(0)
    problem = sample_problem(rng)
    solution = write_solution(problem, FAULTLESS, rng)
    shown = render_solution([step.text for step in solution.steps], str(solution.answer))
    done = asyncio.run(
        served.complete(
            PROMPTS.reward(Variant.PRM_COT, problem.question, shown),
            SamplingConfig(max_new_tokens=120),
            0,
        )
    )
    outcome = parse_verifier_output(
        done.text, str(done.generation.finish_reason), 9, len(solution.steps)
    )
    assert outcome == Verdict((True,) * len(solution.steps), True)


def test_the_served_judge_rejects_an_unknown_prompt() -> None:
    """An unknown prompt is a failed verification, not a verdict."""
    served = ScriptedJudge.served(ASSETS / "verifier", BY_NAME["judge_directed"])
    with pytest.raises(EngineFailure, match="prompt"):
        asyncio.run(served.complete([{"role": "user", "content": "hello"}], SamplingConfig(), 0))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_exploit_is_found_without_its_constraint_and_not_with_it(tmp_path: Path) -> None:
    """One exploit and one seed, with the real stage III; `make hacking` runs the others."""
    exploit = "solution_appending"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools/hacking_simulator.py"),
            "--seeds",
            "0",
            "--exploits",
            exploit,
            "--runs",
            str(tmp_path),
            "--out",
            str(tmp_path / "results.md"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without, constrained = (
        json.loads((tmp_path / SimulatorRun(exploit, on, 0).name / "outcome.json").read_text())
        for on in (False, True)
    )
    assert without["rate_last"] > 0.5 and constrained["rate_last"] < 0.1
    assert without["reward_last"] > 0.6
    assert without["accuracy_last"] < constrained["accuracy_last"] - 0.2
    assert "| 1 of 1 | 0 of 1 |" in (tmp_path / "results.md").read_text()
