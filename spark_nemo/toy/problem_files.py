"""Data files of the toy task; splits share no question, and only evaluation files have answers."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path

from spark_nemo.toy.habits import ERROR_RICH, GeneratorHabits, tagged_response, write_solution
from spark_nemo.toy.oracle import written_truths
from spark_nemo.toy.problems import ToyProblem, sample_problems
from spark_nemo.utils.files import write_text_atomic

SPLITS = ("eval", "processbench", "stage1", "rl", "sft")
"""Splits in the order in which they are drawn: each avoids the questions of the ones before it."""
_HELD_OUT_SIZE = 2000
_HELD_OUT_SEED = 20_26


@lru_cache(maxsize=1)
def held_out_questions() -> frozenset[str]:
    """Return the questions of the evaluation splits, which pretraining and training avoid."""
    problems = [*_held_out("eval"), *_held_out("processbench")]
    return frozenset(problem.question for problem in problems)


def split_problems(split: str, count: int, seed: int) -> list[ToyProblem]:
    """Return ``count`` problems of a split; only the training splits depend on ``seed``.

    Raises ``ValueError`` for an unknown split or more evaluation problems than there are.
    """
    if split not in SPLITS:
        raise ValueError(f"toy split {split!r}: choose one of {', '.join(SPLITS)}")
    if split in ("eval", "processbench"):
        if count > _HELD_OUT_SIZE:
            raise ValueError(f"toy:{split}:{count}: the split holds {_HELD_OUT_SIZE} problems")
        return _held_out(split)[:count]
    return sample_problems(count, _stream(seed, split), _avoided(split, seed))


def write_problems(split: str, count: int, seed: int, folder: Path) -> Path:
    """Write the answer-free JSONL of a training split."""
    rows = [
        {"problem_id": p.record().problem_id, "question": p.question, "source": "toy"}
        for p in split_problems(split, count, seed)
    ]
    return _write_rows(folder / f"{split}-{count}-seed{seed}_problems.jsonl", rows)


def write_answers(split: str, count: int, seed: int, folder: Path) -> Path:
    """Write answer keys by problem id, for evaluation and the RLVR baseline only."""
    rows = [
        {"problem_id": p.record().problem_id, "question": p.question, "answer": str(p.values[-1])}
        for p in split_problems(split, count, seed)
    ]
    return _write_rows(folder / f"{split}-{count}-seed{seed}_answers.jsonl", rows)


def write_policy_examples(count: int, seed: int, folder: Path) -> Path:
    """Write responses with the generator's mistakes, which teach the policy's format."""
    rng = random.Random(f"toy sft {seed}")
    rows = []
    for problem in split_problems("sft", count, seed):
        solution = write_solution(problem, GeneratorHabits(), rng)
        steps = [step.text for step in solution.steps]
        rows.append(
            {
                "problem_id": problem.record().problem_id,
                "question": problem.question,
                "response": tagged_response(steps, str(solution.answer)),
            }
        )
    return _write_rows(folder / f"sft-{count}-seed{seed}_examples.jsonl", rows)


def write_processbench(count: int, folder: Path) -> Path:
    """Write ProcessBench-format cases, about half of them with an error, and their true labels."""
    rng = random.Random("toy processbench")
    rows = []
    for index, problem in enumerate(split_problems("processbench", count, 0)):
        solution = write_solution(problem, ERROR_RICH, rng)
        truths = written_truths(problem, solution)
        rows.append(
            {
                "id": f"toy-{index}",
                "generator": "toy",
                "problem": problem.question,
                "steps": [step.text for step in solution.steps],
                "final_answer_correct": solution.answer == problem.values[-1],
                "label": truths.index(False) if False in truths else -1,
            }
        )
    path = folder / f"processbench-{count}.json"
    write_text_atomic(path, json.dumps(rows, indent=1))
    return path


def _avoided(split: str, seed: int) -> frozenset[str]:
    """Return the held-out questions and the first ones of the training splits before this one."""
    before = SPLITS[SPLITS.index("stage1") : SPLITS.index(split)]
    return held_out_questions().union(*(_first_questions(each, seed) for each in before))


@lru_cache(maxsize=8)
def _first_questions(split: str, seed: int) -> frozenset[str]:
    problems = sample_problems(_HELD_OUT_SIZE, _stream(seed, split), _avoided(split, seed))
    return frozenset(problem.question for problem in problems)


def _held_out(split: str) -> list[ToyProblem]:
    first = sample_problems(2 * _HELD_OUT_SIZE, _HELD_OUT_SEED)
    return first[:_HELD_OUT_SIZE] if split == "eval" else first[_HELD_OUT_SIZE:]


def _stream(seed: int, split: str) -> int:
    return seed * 10 + SPLITS.index(split)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text_atomic(path, "".join(lines))
    return path
