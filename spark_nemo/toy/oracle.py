"""True step labels of the toy task, for evaluation and reports; stages I to III never see them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spark_nemo.toy.habits import WrittenSolution, expected_step
from spark_nemo.toy.problems import ToyProblem, parse_question

_STEP = re.compile(r"^(\d+)([-+*])(\d+)=(\d+)$")


def step_truths(question: str, steps: Sequence[str]) -> tuple[bool, ...]:
    """Return whether each step carries out the question's operation correctly.

    Each step is judged on its own, given the claimed result of the step before it. A step that is
    not an equation is wrong.
    """
    problem = parse_question(question)
    truths = []
    left = problem.start
    for index, text in enumerate(steps):
        match = _STEP.match(text.strip())
        expected = expected_step(problem, index, left)
        truths.append(match is not None and expected is not None and expected.text == text.strip())
        left = int(match[4]) if match else -1
    return tuple(truths)


def written_truths(problem: ToyProblem, solution: WrittenSolution) -> tuple[bool, ...]:
    """Return ``step_truths`` of a solution in typed form."""
    return step_truths(problem.question, [step.text for step in solution.steps])


def answer(question: str) -> str:
    """Return the correct answer of a question."""
    return str(parse_question(question).values[-1])
