"""The small world's hidden truth. Evaluation and reports may ask it; stages I to III never see it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spark_nemo.toy.habits import WrittenSolution, expected_step
from spark_nemo.toy.problems import ToyProblem, parse_question

_STEP = re.compile(r"^(\d+)([-+*])(\d+)=(\d+)$")


def step_truths(question: str, steps: Sequence[str]) -> tuple[bool, ...]:
    """Per step: does it carry out the question's operation on the result of the step before,
    correctly?

    Each step is judged on its own, given what the step before it claims; a step in no arithmetic
    form is wrong.
    """
    problem = parse_question(question)
    truths, left = [], problem.start
    for index, text in enumerate(steps):
        match = _STEP.match(text.strip())
        expected = expected_step(problem, index, left)
        truths.append(match is not None and expected is not None and expected.text == text.strip())
        left = int(match[4]) if match else -1
    return tuple(truths)


def written_truths(problem: ToyProblem, solution: WrittenSolution) -> tuple[bool, ...]:
    """``step_truths`` of a solution that is still in typed form."""
    return step_truths(problem.question, [step.text for step in solution.steps])


def answer(question: str) -> str:
    """The right answer of a question of the small world."""
    return str(parse_question(question).values[-1])
