"""Problems of the toy task: two or three arithmetic steps, as a formula or as a story.

Every value on the way is in 0..30, so that the tokenizer has a token for each number. A question
can be parsed back into its problem, so the oracle judges solutions without stored answers.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from spark_nemo.records import Problem, content_key

OPERATIONS = {"+": "Add", "-": "Subtract", "*": "Multiply"}
MAX_VALUE = 30
_STORY = {
    "+": "{name} finds {n} more.",
    "-": "{name} loses {n}.",
    "*": "The number is multiplied by {n}.",
}
_NAMES = ("Ann", "Bob", "Cem", "Dia")
_THINGS = ("coins", "cards", "shells")


@dataclass(frozen=True, slots=True)
class ToyProblem:
    """``start`` followed by ``operations`` applied from left to right."""

    start: int
    operations: tuple[tuple[str, int], ...]
    question: str

    @property
    def values(self) -> tuple[int, ...]:
        """Correct value after each operation."""
        values = []
        value = self.start
        for operator, operand in self.operations:
            value = apply(operator, value, operand)
            values.append(value)
        return tuple(values)

    def record(self) -> Problem:
        """Return the answer-free record that stages I to III see."""
        return Problem(
            problem_id=f"toy-{content_key(self.question)}", question=self.question, source="toy"
        )


def apply(operator: str, value: int, operand: int) -> int:
    """Compute ``value operator operand`` for one of ``OPERATIONS``."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def sample_problem(rng: random.Random) -> ToyProblem:
    """Draw one problem; formula and story are equally likely."""
    start = rng.randint(2, 24)
    operations: list[tuple[str, int]] = []
    value = start
    for _ in range(rng.choice((2, 3))):
        operator = rng.choice([o for o in OPERATIONS if legal_operands(o, value)])
        operand = rng.choice(legal_operands(operator, value))
        operations.append((operator, operand))
        value = apply(operator, value, operand)
    tell = _formula if rng.random() < 0.5 else _story
    return ToyProblem(start, tuple(operations), tell(start, operations, rng))


def sample_problems(
    count: int, seed: int, exclude: frozenset[str] = frozenset()
) -> list[ToyProblem]:
    """Draw ``count`` different problems whose questions are not in ``exclude``."""
    rng = random.Random(f"toy problems {seed}")
    problems: dict[str, ToyProblem] = {}
    while len(problems) < count:
        problem = sample_problem(rng)
        if problem.question not in exclude:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def parse_question(question: str) -> ToyProblem:
    """Parse a question; raises ``ValueError`` for a text that is not a question of the toy task."""
    if question.startswith("Compute "):
        tokens = re.findall(r"\d+|[-+*]", question)
        operations = list(zip(tokens[1::2], map(int, tokens[2::2])))
        return ToyProblem(int(tokens[0]), tuple(operations), question)
    match = re.match(r"\w+ has (\d+) \w+\.", question)
    if match is None:
        raise ValueError(f"not a question of the toy task: {question!r}")
    operators = {"finds": "+", "loses": "-", "multiplied by": "*"}
    operations = [
        (operators[verb], int(operand))
        for verb, operand in re.findall(r"(finds|loses|multiplied by) (\d+)", question)
    ]
    return ToyProblem(int(match[1]), tuple(operations), question)


def legal_operands(operator: str, value: int) -> list[int]:
    """Return the operands that keep the result in range."""
    candidates = range(2, 4) if operator == "*" else range(1, 10)
    if operator == "*" and value == 0:
        return []
    return [n for n in candidates if 0 <= apply(operator, value, n) <= MAX_VALUE]


def _formula(start: int, operations: list[tuple[str, int]], _: random.Random) -> str:
    text = str(start)
    for index, (operator, operand) in enumerate(operations):
        text = f"{text}{operator}{operand}" if index == 0 else f"({text}){operator}{operand}"
    return f"Compute {text}."


def _story(start: int, operations: list[tuple[str, int]], rng: random.Random) -> str:
    name = rng.choice(_NAMES)
    thing = rng.choice(_THINGS)
    told = " ".join(
        _STORY[operator].format(name=name, n=operand) for operator, operand in operations
    )
    return f"{name} has {start} {thing}. {told} How many {thing} now?"
