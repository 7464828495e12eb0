"""Pretraining text of the toy task's base models, in the project's own grammar and prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spark_nemo.grammar import StepJudgement, prompt_set, render_solution, render_verification
from spark_nemo.toy.habits import (
    ALARMING,
    CAREFUL,
    ERROR_RICH,
    FAULTLESS,
    GLANCE,
    GeneratorHabits,
    VerifierHabits,
    WrittenSolution,
    WrittenStep,
    expected_step,
    is_complete,
    misquote,
    tagged_response,
    write_solution,
)
from spark_nemo.toy.problems import (
    MAX_VALUE,
    OPERATIONS,
    ToyProblem,
    apply,
    legal_operands,
    sample_problem,
)

PROMPTS = prompt_set("compact")


@dataclass(frozen=True, slots=True)
class CorpusExample:
    """A completion to learn, after chat ``messages`` or, for drills, after a bare ``prefix``."""

    messages: list[dict[str, str]]
    completion: str
    prefix: str = ""

    def stop(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens after the completion: a chat turn ends, a drill does not."""
        return tuple(eos_ids[:1]) if self.messages else ()


def drill_corpus(seed: int) -> Iterator[CorpusExample]:
    """Yield mostly bare facts and comparisons, and a few whole texts to introduce the formats."""
    rng = random.Random(f"drill corpus {seed}")
    clean = clean_corpus(seed, frozenset())
    while True:
        draw = rng.random()
        if draw < 0.65:
            yield _fact_drill(rng)
        elif draw < 0.97:
            yield _comparison_drill(rng)
        else:
            yield next(clean)


def clean_corpus(seed: int, held_out: frozenset[str]) -> Iterator[CorpusExample]:
    """Yield correct solutions and careful verifications, with some drills among them."""
    rng = random.Random(f"clean corpus {seed}")
    for problem in sampled_problems(rng, held_out):
        draw = rng.random()
        if draw < 0.2:
            yield _fact_drill(rng)
        elif draw < 0.35:
            yield _comparison_drill(rng)
        elif draw < 0.65:
            yield _solution_example(problem, write_solution(problem, FAULTLESS, rng), rng)
        else:
            solution = write_solution(problem, ALARMING if rng.random() < 0.8 else FAULTLESS, rng)
            yield _verification_example(problem, solution, CAREFUL, rng)


def generator_corpus(seed: int, held_out: frozenset[str]) -> Iterator[CorpusExample]:
    """Yield solutions with the generator's mistakes, half of them in the tagged policy format."""
    rng = random.Random(f"generator corpus {seed}")
    for problem in sampled_problems(rng, held_out):
        yield _solution_example(problem, write_solution(problem, GeneratorHabits(), rng), rng)


def verifier_corpus(seed: int, held_out: frozenset[str]) -> Iterator[CorpusExample]:
    """Yield verifications with the verifier's habits, of solutions by both kinds of solvers."""
    rng = random.Random(f"verifier corpus {seed}")
    for problem in sampled_problems(rng, held_out):
        habits = ERROR_RICH if rng.random() < 0.6 else GeneratorHabits()
        solution = write_solution(problem, habits, rng)
        yield _verification_example(problem, solution, VerifierHabits(), rng)


def _solution_example(
    problem: ToyProblem, solution: WrittenSolution, rng: random.Random
) -> CorpusExample:
    steps = [step.text for step in solution.steps]
    answer = str(solution.answer)
    if rng.random() < 0.5:
        return CorpusExample(PROMPTS.solve(problem.question), render_solution(steps, answer))
    return CorpusExample(PROMPTS.policy(problem.question), tagged_response(steps, answer))


def _verification_example(
    problem: ToyProblem, solution: WrittenSolution, habits: VerifierHabits, rng: random.Random
) -> CorpusExample:
    steps = [step.text for step in solution.steps]
    # ProcessBench cases do not have an answer line, so the verifier has to learn both forms.
    if rng.random() < 0.7:
        shown = render_solution(steps, str(solution.answer))
        complete = is_complete(problem, solution)
    else:
        shown = render_solution(steps, None)
        complete = len(steps) == len(problem.operations)
    return CorpusExample(
        PROMPTS.verify(problem.question, shown),
        write_verification(problem, solution, complete, habits, rng),
    )


def _fact_drill(rng: random.Random) -> CorpusExample:
    fact = _random_fact(rng)
    prefix, result = fact.text.split("=")
    return CorpusExample([], result, f"{prefix}=")


def _comparison_drill(rng: random.Random) -> CorpusExample:
    fact = _random_fact(rng)
    claim = misquote(fact, rng) if rng.random() < 0.5 else fact
    verdict = f"**This step is {'correct' if claim == fact else 'incorrect'}.**"
    return CorpusExample([], verdict, f"{recomputation(fact.text, claim, rng)}\n")


def _random_fact(rng: random.Random) -> WrittenStep:
    while True:
        left = rng.randint(0, MAX_VALUE)
        operator = rng.choice(list(OPERATIONS))
        operands = legal_operands(operator, left)
        if operands:
            operand = rng.choice(operands)
            return WrittenStep(left, operator, operand, apply(operator, left, operand))


def write_verification(
    problem: ToyProblem,
    solution: WrittenSolution,
    complete: bool,
    habits: VerifierHabits,
    rng: random.Random,
) -> str:
    """Verify ``solution`` as a verifier with these habits, which never mistakes completeness."""
    judgements = []
    left = problem.start
    for index, step in enumerate(solution.steps):
        judgements.append(_judge(step, expected_step(problem, index, left), habits, rng))
        left = step.result
    answer_correct = complete and all(j.correct for j in judgements)
    return render_verification(judgements, answer_correct)


def _judge(
    step: WrittenStep, expected: WrittenStep | None, habits: VerifierHabits, rng: random.Random
) -> StepJudgement:
    title = OPERATIONS[step.operator]
    skim = habits.skim_easy if step.operator == "+" else habits.skim_hard
    if rng.random() < skim:
        return StepJudgement(title, GLANCE, rng.random() < habits.benefit_of_doubt)
    careless = rng.random() < habits.careless
    correct = (step == expected) != careless
    if habits.miscompute and expected is not None and rng.random() < habits.miscompute:
        expected = misquote(expected, rng)
    recomputed = expected.text if expected is not None else "nothing"
    return StepJudgement(title, recomputation(recomputed, step, rng), correct)


def recomputation(recomputed: str, step: WrittenStep, rng: random.Random) -> str:
    """Compare a computation with a step's claim, in one of the verifier's two wordings."""
    if rng.random() < 0.5:
        return f"Check: {recomputed}. Claim: {step.text}."
    return f"I get {recomputed}, written {step.text}."


def sampled_problems(rng: random.Random, held_out: frozenset[str]) -> Iterator[ToyProblem]:
    """Yield problems without end, none of them held out."""
    while True:
        problem = sample_problem(rng)
        if problem.question not in held_out:
            yield problem
