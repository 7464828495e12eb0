"""Stage I's sampling: solutions and their verifications, every one stored as soon as it is there.

A result is stored under a key made of everything that determines it, so a run that was killed, or grown to more votes,
asks only for what is missing. A solution goes to its verifier the moment it is finished.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from spark_nemo.config import Stage1Config
from spark_nemo.engines.base import EngineFailure
from spark_nemo.engines.served import ServedModel
from spark_nemo.grammar import (
    GRAMMAR_VERSION,
    ParsedResponse,
    StepFormat,
    parse_generation,
    prompt_set,
    split_response,
)
from spark_nemo.records import (
    EngineError,
    Outcome,
    ParseFailure,
    Problem,
    Solution,
    Verdict,
    Verification,
    content_key,
    derive_seed,
    outcome_from_json,
)
from spark_nemo.records.store import RecordStore

SOLUTION, VERIFICATION = "solution", "verification"
_MOST_REASONS = 50


@dataclass(slots=True)
class CollectCounts:
    """What one run did; ``sampled`` tokens were paid for now, reused results were not."""

    solutions: int = 0
    unusable_solutions: int = 0
    verifications: int = 0
    failed_verifications: int = 0
    reused: int = 0
    solution_tokens: int = 0
    verification_tokens: int = 0
    engine_failures: dict[str, int] = field(default_factory=dict)
    """Requests that an engine refused or lost, by its reason with every number written N. Not stored: asked again."""

    def engine_failed(self, failure: EngineFailure) -> None:
        """Count one by its reason; beyond some number of reasons they are not told apart."""
        reason = re.sub(r"\d+", "N", str(failure))
        if reason not in self.engine_failures and len(self.engine_failures) >= _MOST_REASONS:
            reason = "other"
        self.engine_failures[reason] = self.engine_failures.get(reason, 0) + 1


class Collector:
    """Asks generator and verifier for what the store does not hold yet."""

    def __init__(
        self, config: Stage1Config, seed: int, generator: ServedModel, verifier: ServedModel, store: RecordStore,
        on_result: Callable[[CollectCounts], None] = lambda counts: None,
    ) -> None:
        self.config, self.seed, self.store, self.on_result = config, seed, store, on_result
        self.generator, self.verifier = generator, verifier
        self.prompts = prompt_set(config.prompt_set)
        self.counts = CollectCounts()
        self._solved_by = (GRAMMAR_VERSION, self.prompts.version, generator.identity, asdict(config.generator_sampling))
        self._verified_by = (GRAMMAR_VERSION, self.prompts.version, verifier.identity, asdict(config.verifier_sampling))

    def made_by(self) -> dict[str, object]:
        """Everything but the problems that the results depend on, by setting; plain JSON."""
        return {"run.seed": self.seed, "stage1.prompt_set": self.prompts.version, "the grammar": GRAMMAR_VERSION,
                "models.generator": self.generator.identity, "models.verifier": self.verifier.identity,
                "stage1.generator_sampling": asdict(self.config.generator_sampling),
                "stage1.verifier_sampling": asdict(self.config.verifier_sampling)}

    async def run(self, problems: Sequence[Problem], max_problems_in_flight: int) -> CollectCounts:
        """Sample everything missing for ``problems``; at most so many of them are open at once."""
        slots = asyncio.Semaphore(max_problems_in_flight)

        async def one(problem: Problem) -> None:
            async with slots, asyncio.TaskGroup() as group:
                for index in range(self.config.solutions_per_problem):
                    group.create_task(self._solve_and_verify(problem, index))

        async with asyncio.TaskGroup() as group:
            for problem in problems:
                group.create_task(one(problem))
        return self.counts

    async def _solve_and_verify(self, problem: Problem, index: int) -> None:
        solution = await self._solution(problem, index)
        parsed = parse_solution(solution)
        self.counts.solutions += 1
        if isinstance(parsed, ParseFailure):
            self.counts.unusable_solutions += 1
            self.on_result(self.counts)
            return
        async with asyncio.TaskGroup() as group:
            for vote in range(self.config.verifications_per_solution):
                group.create_task(self._verification(solution, parsed, vote))

    async def _solution(self, problem: Problem, index: int) -> Solution:
        key = content_key(SOLUTION, problem.question, self._solved_by, self.seed, index)
        stored = self.store.get(key, SOLUTION)
        if stored is not None:
            self.counts.reused += 1
            return Solution.from_json(stored)
        try:
            completion = await self.generator.complete(
                self.prompts.solve(problem.question), self.config.generator_sampling, derive_seed(key))
            text, reason = completion.text, str(completion.generation.finish_reason)
            num_tokens = len(completion.generation.token_ids)
        except EngineFailure as failure:
            # Not stored: the next run asks again.
            self.counts.engine_failed(failure)
            return Solution(key, problem.problem_id, problem.question, str(failure), "abort", 0)
        solution = Solution(key, problem.problem_id, problem.question, text, reason, num_tokens)
        self.store.append(key, SOLUTION, asdict(solution))
        self.counts.solution_tokens += num_tokens
        return solution

    async def _verification(self, solution: Solution, parsed: ParsedResponse, vote: int) -> None:
        key = content_key(VERIFICATION, solution.key, self._verified_by, self.seed, vote)
        stored = self.store.get(key, VERIFICATION)
        if stored is not None:
            self.counts.reused += 1
            outcome = outcome_from_json(stored["outcome"])
        else:
            outcome = await self._ask_verifier(key, solution, parsed, vote)
        self.counts.verifications += 1
        self.counts.failed_verifications += not isinstance(outcome, Verdict)
        self.on_result(self.counts)

    async def _ask_verifier(self, key: str, solution: Solution, parsed: ParsedResponse, vote: int) -> Outcome:
        messages = self.prompts.verify(solution.question, parsed.canonical(), len(parsed.steps))
        try:
            completion = await self.verifier.complete(messages, self.config.verifier_sampling, derive_seed(key))
        except EngineFailure as failure:
            self.counts.engine_failed(failure)
            return EngineError(str(failure))  # not stored: the next run asks again
        num_tokens = len(completion.generation.token_ids)
        outcome = parse_generation(
            completion.text, str(completion.generation.finish_reason), num_tokens, len(parsed.steps))
        record = Verification(key, solution.key, vote, completion.text, outcome, num_tokens)
        self.store.append(key, VERIFICATION, record.to_json(), parent=solution.key)
        self.counts.verification_tokens += num_tokens
        return outcome


def parse_solution(solution: Solution) -> ParsedResponse | ParseFailure:
    """The steps of a stored solution, or why it has none; a truncated or aborted one has none."""
    if solution.finish_reason != "stop":
        return ParseFailure(f"finish_reason: {solution.finish_reason}")
    return split_response(solution.text, StepFormat.PLAIN)
