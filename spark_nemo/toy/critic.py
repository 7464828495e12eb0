"""Pretraining text of the toy task's critic: critiques, merges, verifications with a reference.

The critic recomputes every subtraction, and every step that the verification only glanced at. It
trusts any other computation in the verification. It has a weakness of its own: subtracting seven or
more, it mostly forgets to borrow, also in greedy decoding. So it corrects most of a verifier's
mistakes, overlooks some, and adds a few.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from spark_nemo.grammar import (
    ParsedVerification,
    StepJudgement,
    critique_prompts,
    parse_judgements,
    render_solution,
    render_verification,
)
from spark_nemo.toy.corpus import CorpusExample, recomputation, sampled_problems, write_verification
from spark_nemo.toy.habits import (
    ERROR_RICH,
    GLANCE,
    GeneratorHabits,
    VerifierHabits,
    WrittenSolution,
    WrittenStep,
    expected_step,
    is_complete,
    write_solution,
)
from spark_nemo.toy.problems import OPERATIONS, ToyProblem

PROMPTS = critique_prompts("compact")
FINE = "fine"
MISSED_ERROR = "missed error"
FALSE_ALARM = "false alarm"
WRONG_REASON = "wrong reason"
INCONSISTENT = "inconsistent"
_EQUATION = r"\d+[-+*]\d+=\d+"
_SHOWN = re.compile(rf"^(?:Check: |I get )({_EQUATION})[.,]")


@dataclass(frozen=True, slots=True)
class CriticHabits:
    """Probabilities to forget the borrow in a subtraction of at least ``hard_operand``, and to
    write the opposite conclusion about a step.
    """

    forget_borrow: float = 0.75
    hard_operand: int = 7
    careless: float = 0.02


FAULTLESS_CRITIC = CriticHabits(forget_borrow=0.0, careless=0.0)
CRITICISED = VerifierHabits(miscompute=0.04)
"""The verifier in the critic's corpus; its arithmetic sometimes fails, so it has wrong reasons."""


@dataclass(frozen=True, slots=True)
class StepCritique:
    """A critique of one step: own and written computation, judgement, fault of the verification."""

    derived: str
    written: str
    correct: bool
    fault: str

    @property
    def text(self) -> str:
        """Text of the critique."""
        # Judgement before fault: a small model compares two things more easily than three.
        judgement = "correct" if self.correct else "incorrect"
        return f"I get {self.derived}, written {self.written}. {judgement}: {self.fault}"


@dataclass(frozen=True, slots=True)
class WrittenCritique:
    """A critique of a whole verification; ``answer_correct`` is the verdict it argues for."""

    steps: tuple[StepCritique, ...]
    answer_correct: bool
    verdict_fault: str

    @property
    def text(self) -> str:
        """Text of the critique."""
        lines = [f"Step {k}: {step.text}" for k, step in enumerate(self.steps, start=1)]
        answer = "Yes" if self.answer_correct else "No"
        return "\n".join([*lines, f"Answer: {answer}, {self.verdict_fault}"])


def write_critique(
    problem: ToyProblem,
    solution: WrittenSolution,
    verification: ParsedVerification,
    complete: bool,
    habits: CriticHabits,
    rng: random.Random,
) -> WrittenCritique:
    """Criticise ``verification`` as a critic with these habits; it always sees completeness."""
    steps = []
    left = problem.start
    for index, (step, judgement) in enumerate(zip(solution.steps, verification.judgements)):
        steps.append(_criticise(step, expected_step(problem, index, left), judgement, habits, rng))
        left = step.result
    answer_correct = complete and all(step.correct for step in steps)
    fault = FINE if answer_correct == verification.answer_correct else INCONSISTENT
    return WrittenCritique(tuple(steps), answer_correct, fault)


def write_merge(
    solution: WrittenSolution,
    verification: ParsedVerification,
    critique: WrittenCritique,
    rng: random.Random,
) -> str:
    """Merge verification and critique: the critique's judgements, with computations for glances."""
    judgements = []
    for step, judgement, said in zip(solution.steps, verification.judgements, critique.steps):
        keep = said.fault == FINE and judgement.analysis != GLANCE
        analysis = judgement.analysis if keep else recomputation(said.derived, step, rng)
        judgements.append(StepJudgement(OPERATIONS[step.operator], analysis, said.correct))
    return render_verification(judgements, critique.answer_correct)


def critic_corpus(seed: int, held_out: frozenset[str]) -> Iterator[CorpusExample]:
    """Yield critiques, merges and verifications with a reference, of both kinds of solvers."""
    rng = random.Random(f"critic corpus {seed}")
    for problem in sampled_problems(rng, held_out):
        habits = ERROR_RICH if rng.random() < 0.6 else GeneratorHabits()
        solution = write_solution(problem, habits, rng)
        shown = render_solution([step.text for step in solution.steps], str(solution.answer))
        if rng.random() < 0.25:
            yield CorpusExample(
                PROMPTS.verify_with_reference(
                    problem.question, shown, str(problem.values[-1]), len(solution.steps)
                ),
                write_reference_verification(problem, solution, rng),
            )
            continue
        complete = is_complete(problem, solution)
        text = write_verification(problem, solution, complete, CRITICISED, rng)
        verification = parse_judgements(text, len(solution.steps))
        assert isinstance(verification, ParsedVerification)
        critique = write_critique(problem, solution, verification, complete, CriticHabits(), rng)
        if rng.random() < 0.55:
            yield CorpusExample(PROMPTS.critique(problem.question, shown, text), critique.text)
        else:
            yield CorpusExample(
                PROMPTS.merge(problem.question, shown, text, critique.text, len(solution.steps)),
                write_merge(solution, verification, critique, rng),
            )


def write_reference_verification(
    problem: ToyProblem, solution: WrittenSolution, rng: random.Random
) -> str:
    """Verify with the answer in view: it decides the verdict and the steps only glanced at.

    The answer does not tell *where* a solution goes wrong, so skimming still costs there. The
    comparison of the answers is before the first step, where the grammar ignores it, so it never
    becomes part of a training target.
    """
    answer = str(problem.values[-1])
    answer_right = str(solution.answer) == answer
    habits = replace(VerifierHabits(), benefit_of_doubt=1.0 if answer_right else 0.5)
    complete = is_complete(problem, solution) and answer_right
    compared = (
        f"Check: {answer}. Claim: {solution.answer}. {'correct' if answer_right else 'incorrect'}"
    )
    return f"{compared}\n\n{write_verification(problem, solution, complete, habits, rng)}"


def _criticise(
    step: WrittenStep,
    expected: WrittenStep | None,
    judgement: StepJudgement,
    habits: CriticHabits,
    rng: random.Random,
) -> StepCritique:
    shown = _SHOWN.match(judgement.analysis)
    if shown is not None and step.operator != "-":
        derived = shown[1]
    else:
        derived = _derive(expected, habits, rng)
    correct = (derived == step.text) != (rng.random() < habits.careless)
    fault = FINE
    if correct != judgement.correct:
        fault = FALSE_ALARM if correct else MISSED_ERROR
    elif shown is not None and shown[1] != derived:
        fault = WRONG_REASON
    return StepCritique(derived, step.text, correct, fault)


def _derive(expected: WrittenStep | None, habits: CriticHabits, rng: random.Random) -> str:
    if expected is None:
        return "nothing"
    borrows = expected.operator == "-" and expected.left % 10 < expected.operand % 10
    if borrows and expected.operand >= habits.hard_operand and rng.random() < habits.forget_borrow:
        return replace(expected, result=expected.result + 10).text
    return expected.text
