"""The toy task's oracle, corpora and data files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from spark_nemo.grammar import parse_verification
from spark_nemo.records import Verdict
from spark_nemo.toy.corpus import verifier_corpus, write_verification
from spark_nemo.toy.habits import CAREFUL, ERROR_RICH, FAULTLESS, is_complete, write_solution
from spark_nemo.toy.oracle import answer, written_truths
from spark_nemo.toy.problem_files import (
    SPLITS,
    split_problems,
    write_answers,
    write_problems,
    write_processbench,
)
from spark_nemo.toy.problems import MAX_VALUE, parse_question, sample_problems


def test_a_question_reads_back_into_its_problem() -> None:
    """Both forms of a question parse back into their problem."""
    for problem in sample_problems(500, seed=1):
        assert parse_question(problem.question) == problem
        assert all(0 <= value <= MAX_VALUE for value in problem.values)


def test_splits_share_no_question() -> None:
    """No training split has a question of an evaluation split or of another training split."""
    questions = [{p.question for p in split_problems(split, 300, seed=3)} for split in SPLITS]
    for index, split in enumerate(questions):
        assert all(split.isdisjoint(other) for other in questions[:index])


def test_training_files_hold_no_answer(tmp_path: Path) -> None:
    """Only the answer files have an answer field."""
    for row in write_problems("rl", 20, 0, tmp_path).read_text().splitlines():
        assert json.loads(row).keys() == {"problem_id", "question", "source"}
    rows = [
        json.loads(row) for row in write_answers("eval", 20, 0, tmp_path).read_text().splitlines()
    ]
    assert all(row["answer"] == answer(row["question"]) for row in rows)


def test_the_oracle_agrees_with_solvers_who_make_no_mistake_and_with_those_who_do() -> None:
    """A faultless solution is correct in every step, and a wrong answer has a wrong step."""
    rng = random.Random(0)
    for problem in sample_problems(300, seed=2):
        faultless = write_solution(problem, FAULTLESS, rng)
        assert all(written_truths(problem, faultless))
        assert faultless.answer == problem.values[-1]
        solution = write_solution(problem, ERROR_RICH, rng)
        if is_complete(problem, solution) and all(written_truths(problem, solution)):
            assert solution.answer == problem.values[-1]


def test_a_careful_verification_parses_to_the_truth() -> None:
    """The corpus follows the grammar, and its labels mean what the oracle's mean."""
    rng = random.Random(1)
    for problem in sample_problems(200, seed=4):
        solution = write_solution(problem, ERROR_RICH, rng)
        complete = is_complete(problem, solution)
        outcome = parse_verification(
            write_verification(problem, solution, complete, CAREFUL, rng), len(solution.steps)
        )
        assert isinstance(outcome, Verdict)
        assert outcome.step_labels == written_truths(problem, solution)
        assert outcome.answer_correct == (complete and all(outcome.step_labels))


def test_the_verifier_corpus_never_contradicts_itself() -> None:
    """No example ends with Yes after a step with an error: stage III rewards that last line."""
    corpus = verifier_corpus(0, frozenset())
    for _ in range(300):
        outcome = parse_verification(next(corpus).completion)
        assert isinstance(outcome, Verdict)
        assert all(outcome.step_labels) or not outcome.answer_correct


def test_processbench_cases_hold_errors_and_right_solutions(tmp_path: Path) -> None:
    """Cases have the official fields, and both kinds are common enough to score."""
    rows = json.loads(write_processbench(200, tmp_path).read_text())
    assert {"id", "generator", "problem", "steps", "final_answer_correct", "label"} == rows[
        0
    ].keys()
    share = sum(row["label"] >= 0 for row in rows) / len(rows)
    assert 0.3 < share < 0.8
