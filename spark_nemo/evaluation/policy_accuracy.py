"""True accuracy of a policy on held-out problems: sampled and greedy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.config import EvaluationConfig, SamplingConfig
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import PromptSet, extract_boxed
from spark_nemo.records import Problem, derive_seed

from .accuracy import GradedSample, mean_accuracy
from .answers import EvalProblem, grade_answers
from .bootstrap import Estimate
from .checker import AnswerGrade
from .saved_completions import SavedCompletion


@dataclass(frozen=True, slots=True)
class PolicyAccuracy:
    """Fractions with their bootstrap intervals over problems.

    ``samples`` are the graded sampled completions; ``completions`` are the texts of all, greedy
    ones too, from which everything else can be computed again.
    """

    sampled: Estimate
    greedy: Estimate
    samples: list[GradedSample]
    num_tokens: int
    completions: list[SavedCompletion]


async def evaluate_policy(
    served: ServedModel,
    problems: Sequence[EvalProblem],
    prompts: PromptSet,
    config: EvaluationConfig,
) -> PolicyAccuracy:
    """Sample and grade completions of every problem, and one greedy completion each.

    The last ``\\boxed{}`` is the prediction; a completion without one is wrong. Raises
    ``EngineFailure`` when the engine cannot serve a problem: a failed engine is not a score.
    """
    completions, num_tokens = await sample_policy(
        served, [p.problem for p in problems], prompts, config
    )
    # Grading starts after the last completion: a symbolic answer can take the checker seconds, and
    # decoding would wait for it.
    keys = {p.problem.problem_id: p.answer for p in problems}
    answers = [extract_boxed(row.text) for row in completions]
    grades = grade_answers(
        [(answer, keys[row.problem_id]) for row, answer in zip(completions, answers)]
    )
    rows = [
        GradedSample(row.problem_id, row.sample, grade is AnswerGrade.EQUAL, answer)
        for row, grade, answer in zip(completions, grades, answers)
    ]
    num_sampled = len(problems) * config.samples_per_problem
    return PolicyAccuracy(
        sampled=mean_accuracy(rows[:num_sampled], config.bootstrap_samples),
        greedy=mean_accuracy(rows[num_sampled:], config.bootstrap_samples),
        samples=rows[:num_sampled],
        num_tokens=num_tokens,
        completions=completions,
    )


async def sample_policy(
    served: ServedModel, problems: Sequence[Problem], prompts: PromptSet, config: EvaluationConfig
) -> tuple[list[SavedCompletion], int]:
    """Return the sampled completions of all problems, then the greedy ones, and their total tokens.

    Seeds depend on problem and sample number alone, so two policies are compared on the same
    draws. Raises ``EngineFailure``.
    """
    sampled = SamplingConfig(
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k,
    )
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)

    async def complete(
        problem: Problem, index: int, sampling: SamplingConfig
    ) -> tuple[SavedCompletion, int]:
        seed = derive_seed("eval", problem.problem_id, index)
        done = await served.complete(prompts.policy(problem.question), sampling, seed)
        row = SavedCompletion(problem.problem_id, index, sampling is greedy, done.text)
        return row, len(done.generation.token_ids)

    jobs = [
        complete(problem, index, sampled)
        for problem in problems
        for index in range(config.samples_per_problem)
    ]
    jobs += [complete(problem, 0, greedy) for problem in problems]
    replies = await asyncio.gather(*jobs)
    return [row for row, _ in replies], sum(tokens for _, tokens in replies)
