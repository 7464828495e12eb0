"""The two declared baselines of stages I and II that read answer keys.

This is the only module of ``verification`` that imports answers. Each baseline needs a file of
answers named in the configuration, and hands on a function; no record has a field for an answer.
"""

from __future__ import annotations

import logging

from spark_nemo.config import ConfigError
from spark_nemo.evaluation.answers import answer_matches, read_answer_keys
from spark_nemo.grammar import ChatMessages, ParsedResponse, canonical_solution, critique_prompts
from spark_nemo.records import LabelledSolution, Solution

from .label_filter import IsCorrect
from .reference import MakePrompt
from .sampler import parse_solution

log = logging.getLogger(__name__)


def reference_guided_prompt(answers: str, prompt_set: str) -> MakePrompt:
    """Function that makes the verification prompt with the expected answer in it.

    ``answers`` is the file that ``stage1.reference_answers`` names.
    """
    log.warning(
        "reference-guided baseline: the answers of %s are shown to the verifier; "
        "the other label methods do not read them",
        answers,
    )
    keys = read_answer_keys(answers)
    prompts = critique_prompts(prompt_set)

    def make_prompt(solution: Solution, parsed: ParsedResponse) -> ChatMessages:
        if solution.problem_id not in keys:
            raise ConfigError(
                f"stage1.reference_answers={answers}: no answer for problem "
                f"{solution.problem_id}; add it"
            )
        return prompts.verify_with_reference(
            solution.question,
            canonical_solution(parsed),
            keys[solution.problem_id].answer,
            len(parsed.steps),
        )

    return make_prompt


def ground_truth_check(answers: str) -> IsCorrect:
    """Function that compares a labelled solution's answer with the key, for balancing.

    ``answers`` is the file that ``labels.reference_answers`` names.
    """
    log.warning(
        "labels.balance=ground_truth: a declared baseline, labels are chosen with the answers of %s",
        answers,
    )
    keys = read_answer_keys(answers)

    def is_correct(label: LabelledSolution) -> bool:
        problem_id = label.solution.problem_id
        if problem_id not in keys:
            raise ConfigError(
                f"labels.reference_answers={answers}: no answer for problem {problem_id}; add it"
            )
        parsed = parse_solution(label.solution)
        if not isinstance(parsed, ParsedResponse):
            return False
        return answer_matches(parsed.answer, keys[problem_id].answer)

    return is_correct
