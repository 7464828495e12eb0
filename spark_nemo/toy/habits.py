"""Mistakes of the toy task's pretrained models, which their pretraining text teaches them.

The generator miscomputes at random, forgets carries as a habit (so its most likely answer is wrong
there), and sometimes takes a wrong number, a wrong operation, or stops early. The verifier
recomputes most steps with care but skims those that look easy: its most likely path on an addition
is to skim, while most of its *probability* recomputes. So a greedy verification is worse than a
vote over sampled ones, and consistency labels have something to exploit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spark_nemo.toy.problems import MAX_VALUE, OPERATIONS, ToyProblem, apply


@dataclass(frozen=True, slots=True)
class GeneratorHabits:
    """Probabilities of a mistake at each written step."""

    slip: float = 0.12
    forget_carry: float = 0.50
    wrong_operand: float = 0.02
    wrong_operation: float = 0.02
    stop_early: float = 0.02
    wrong_answer_line: float = 0.02


ERROR_RICH = GeneratorHabits(
    slip=0.25,
    forget_carry=0.35,
    wrong_operand=0.07,
    wrong_operation=0.06,
    stop_early=0.06,
    wrong_answer_line=0.05,
)
"""Mistakes in the solutions of the verifier's corpus and of the ProcessBench-format cases."""

ALARMING = GeneratorHabits(
    slip=0.5,
    forget_carry=0.5,
    wrong_operand=0.10,
    wrong_operation=0.08,
    stop_early=0.06,
    wrong_answer_line=0.05,
)
"""Wrong often enough that copying a claim never pays; the verifier learns to verify on these."""

FAULTLESS = GeneratorHabits(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class VerifierHabits:
    """Probabilities to skim a step (additions look easy) and to call a skimmed step correct."""

    skim_easy: float = 0.40
    skim_hard: float = 0.20
    benefit_of_doubt: float = 0.58
    careless: float = 0.02
    """Probability of the opposite conclusion after a correct recomputation."""
    miscompute: float = 0.0
    """Probability of a wrong computation under the right conclusion."""


GLANCE = "At a glance."
"""The analysis of a step that was skimmed."""
CAREFUL = VerifierHabits(skim_easy=0.0, skim_hard=0.0, careless=0.0)


@dataclass(frozen=True, slots=True)
class WrittenStep:
    """One step as a solver wrote it: ``left operator operand = result``."""

    left: int
    operator: str
    operand: int
    result: int

    @property
    def text(self) -> str:
        return f"{self.left}{self.operator}{self.operand}={self.result}"


@dataclass(frozen=True, slots=True)
class WrittenSolution:
    """Steps and the answer line."""

    steps: tuple[WrittenStep, ...]
    answer: int


def write_solution(
    problem: ToyProblem, habits: GeneratorHabits, rng: random.Random
) -> WrittenSolution:
    """Solve ``problem`` as a solver with these habits; later steps build on earlier results."""
    value = problem.start
    steps = []
    stop = len(problem.operations)
    if rng.random() < habits.stop_early:
        stop -= 1
    for operator, operand in problem.operations[:stop]:
        if rng.random() < habits.wrong_operand:
            operand = max(1, operand + rng.choice((-2, -1, 1, 2)))
        if rng.random() < habits.wrong_operation:
            operator = rng.choice([o for o in OPERATIONS if o != operator])
        result = _compute(value, operator, operand, habits, rng)
        steps.append(WrittenStep(value, operator, operand, result))
        value = result
    answer = _near(value, rng) if rng.random() < habits.wrong_answer_line else value
    return WrittenSolution(tuple(steps), answer)


def tagged_response(steps: Sequence[str], answer: str) -> str:
    """Write a solution in the policy's format."""
    body = "".join(f"<step>{step}</step>" for step in steps)
    return f"<think>{body}</think><answer>\\boxed{{{answer}}}</answer>"


def expected_step(problem: ToyProblem, index: int, left: int) -> WrittenStep | None:
    """Return the correct step ``index`` after a step with result ``left``; None beyond the last."""
    if index >= len(problem.operations):
        return None
    operator, operand = problem.operations[index]
    return WrittenStep(left, operator, operand, apply(operator, left, operand))


def is_complete(problem: ToyProblem, solution: WrittenSolution) -> bool:
    """Return True if every operation is there and the answer line repeats the last result."""
    return (
        len(solution.steps) == len(problem.operations)
        and solution.answer == solution.steps[-1].result
    )


def misquote(step: WrittenStep, rng: random.Random) -> WrittenStep:
    """Change a step: mostly the result, sometimes the operand or the operation."""
    draw = rng.random()
    if draw < 0.75:
        return replace(step, result=_near(step.result, rng))
    if draw < 0.9:
        shift = 1 if step.operand == 1 else rng.choice((-1, 1))
        return replace(step, operand=step.operand + shift)
    return replace(step, operator=rng.choice([o for o in OPERATIONS if o != step.operator]))


def _compute(
    value: int, operator: str, operand: int, habits: GeneratorHabits, rng: random.Random
) -> int:
    right = apply(operator, value, operand)
    if operator == "+" and value % 10 + operand % 10 >= 10 and rng.random() < habits.forget_carry:
        return right - 10
    if not 0 <= right <= MAX_VALUE or rng.random() < habits.slip:
        return _near(right, rng)
    return right


def _near(value: int, rng: random.Random) -> int:
    candidates = [value + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)] + [rng.randint(0, MAX_VALUE)]
    legal = [v for v in candidates if 0 <= v <= MAX_VALUE and v != value]
    return rng.choice(legal or [MAX_VALUE])
