"""True accuracy of a policy on held-out problems: sampled at the evaluation temperature, and
greedy.
"""

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
from .saved_completions import SavedCompletion


@dataclass(frozen=True, slots=True)
class PolicyAccuracy:
    """Fractions with their bootstrap intervals over problems; ``samples`` are the graded sampled
    completions.

    ``completions`` are the texts of all, greedy ones too, from which everything else can be
    computed again.
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
    """``samples_per_problem`` samples at ``temperature`` and one greedy completion of each problem,
    graded.

    The last ``\\boxed{}`` is the prediction; a completion without one is wrong. Raises
    ``EngineFailure`` when the engine cannot serve a problem: that says nothing about the policy.
    """
    completions, num_tokens = await sample_policy(
        served, [p.problem for p in problems], prompts, config
    )
    # Graded when every completion is there: a symbolic answer can take its checker seconds, and
    # decoding would wait.
    keys = {p.problem.problem_id: p.answer for p in problems}
    answers = [extract_boxed(row.text) for row in completions]
    right = grade_answers(
        [(answer, keys[row.problem_id]) for row, answer in zip(completions, answers)]
    )
    rows = [
        GradedSample(row.problem_id, row.sample, correct, answer)
        for row, correct, answer in zip(completions, right, answers)
    ]
    num_sampled = len(problems) * config.samples_per_problem
    return PolicyAccuracy(
        mean_accuracy(rows[:num_sampled], config.bootstrap_samples),
        mean_accuracy(rows[num_sampled:], config.bootstrap_samples),
        rows[:num_sampled],
        num_tokens,
        completions,
    )


async def sample_policy(
    served: ServedModel, problems: Sequence[Problem], prompts: PromptSet, config: EvaluationConfig
) -> tuple[list[SavedCompletion], int]:
    """The sampled completions of all problems, then the greedy ones, and the number of tokens they
    have together.

    Seeds depend on the problem alone, so two policies are compared on the same draws. Raises
    ``EngineFailure``.
    """
    sampled = SamplingConfig(
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k,
    )
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)

    async def ask(question: Problem, index: int, sampling: SamplingConfig) -> tuple[str, int]:
        seed = derive_seed("eval", question.problem_id, index)
        done = await served.complete(prompts.policy(question.question), sampling, seed)
        return done.text, len(done.generation.token_ids)

    jobs = [(p, index, sampled) for p in problems for index in range(config.samples_per_problem)]
    jobs += [(p, 0, greedy) for p in problems]
    replies = await asyncio.gather(*(ask(*job) for job in jobs))
    completions = [
        SavedCompletion(p.problem_id, index, sampling is greedy, text)
        for (p, index, sampling), (text, _) in zip(jobs, replies)
    ]
    return completions, sum(tokens for _, tokens in replies)
