"""The toy task's critic: its corpus of critiques, merges and verifications with a reference."""

from __future__ import annotations

import itertools
import random

import pytest

from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.grammar import ParsedVerification, parse_judgements, parse_verification
from spark_nemo.records import Verdict
from spark_nemo.toy.corpus import write_verification
from spark_nemo.toy.critic import (
    CRITICISED,
    FALSE_ALARM,
    FAULTLESS_CRITIC,
    MISSED_ERROR,
    CriticHabits,
    critic_corpus,
    write_critique,
    write_merge,
    write_reference_verification,
)
from spark_nemo.toy.habits import ERROR_RICH, GeneratorHabits, is_complete, write_solution
from spark_nemo.toy.oracle import written_truths
from spark_nemo.toy.problems import sample_problems
from spark_nemo.toy.resolve import ASSETS


def criticised(habits, count=300):
    """Yield solutions with a verification, its critique and the merge of both."""
    rng = random.Random(7)
    for problem in sample_problems(count, seed=11):
        solution = write_solution(problem, ERROR_RICH, rng)
        complete = is_complete(problem, solution)
        verification = parse_judgements(
            write_verification(problem, solution, complete, CRITICISED, rng)
        )
        assert isinstance(verification, ParsedVerification)
        critique = write_critique(problem, solution, verification, complete, habits, rng)
        yield (
            problem,
            solution,
            verification,
            critique,
            write_merge(solution, verification, critique, rng),
        )


def test_a_merge_follows_the_critique_and_so_does_its_verdict() -> None:
    """Merges follow the grammar and the critique's judgements, without Yes after an error."""
    for _, solution, verification, critique, merge in criticised(CriticHabits()):
        outcome = parse_verification(merge, len(solution.steps))
        assert isinstance(outcome, Verdict)
        assert outcome.step_labels == tuple(step.correct for step in critique.steps)
        assert outcome.answer_correct == critique.answer_correct <= all(outcome.step_labels)
        flipped = [
            new != old for new, old in zip(outcome.step_labels, verification.verdict.step_labels)
        ]
        assert flipped == [step.fault in (MISSED_ERROR, FALSE_ALARM) for step in critique.steps]


def test_a_faultless_critic_repairs_and_the_one_we_have_errs() -> None:
    """The critic's mistakes are its habits.

    Without them only computations that it trusts can be wrong. With them, between a tenth and a
    fourth of the critiques have a mistake.
    """

    def wrong(habits):
        return sum(
            parse_verification(merge).step_labels != written_truths(problem, solution)
            for problem, solution, _, _, merge in criticised(habits)
        )

    unrevised = sum(
        verification.verdict.step_labels != written_truths(problem, solution)
        for problem, solution, verification, _, _ in criticised(CriticHabits())
    )
    faultless, ours = wrong(FAULTLESS_CRITIC), wrong(CriticHabits())
    assert faultless < 30 and 30 <= ours - faultless <= 75 and ours < unrevised


def test_the_answer_decides_the_verdict_and_stays_out_of_the_target() -> None:
    """A verification with the answer never accepts a wrong one; parsing drops it."""
    rng = random.Random(3)
    for problem in sample_problems(200, seed=5):
        solution = write_solution(problem, GeneratorHabits(), rng)
        text = write_reference_verification(problem, solution, rng)
        parsed = parse_judgements(text, len(solution.steps))
        assert isinstance(parsed, ParsedVerification)
        assert solution.answer == problem.values[-1] or not parsed.answer_correct
        assert text.startswith(f"Check: {problem.values[-1]}. Claim: {solution.answer}. ")


def test_every_example_leaves_room_in_the_small_worlds_context() -> None:
    """Prompts with 120 tokens fit into the 320 of conf/experiment/toy_labels.yaml."""
    tokenizer = Tokenizer.load(ASSETS / "critic")
    for example in itertools.islice(critic_corpus(0, frozenset()), 400):
        assert len(tokenizer.encode_chat(example.messages)) + 120 <= 320
        assert len(tokenizer.encode(example.completion)) < 120


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_the_shipped_models_share_their_tokenizer(name: str) -> None:
    """All models have the same tokenizer, byte for byte."""
    assert (ASSETS / name / "tokenizer.json").read_bytes() == (
        ASSETS / "verifier/tokenizer.json"
    ).read_bytes()
