"""Sampling of stage I: solutions and their verifications, each stored as soon as it is complete.

A solution goes to the verifier the moment it is finished. Its votes share their whole prompt and
are requested one after the other, so that the engine can reuse the prompt. Only counts are kept of
a finished solution.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from spark_nemo.config import Stage1Config
from spark_nemo.engines.base import EngineFailure
from spark_nemo.engines.served_model import Completion, ServedModel
from spark_nemo.grammar import (
    GRAMMAR_VERSION,
    ChatMessages,
    ParsedResponse,
    StepFormat,
    Variant,
    canonical_solution,
    parse_verifier_output,
    prompt_set,
    split_response,
)
from spark_nemo.records import (
    SOLUTION,
    VERIFICATION,
    EngineError,
    ParseFailure,
    Problem,
    Solution,
    Verdict,
    Verification,
    content_key,
)
from spark_nemo.records.store import RecordStore

from .early_stop import stopping_rule
from .sampled_store import Failed, Reused, Sampled, SampledStore
from .token_accounting import Cost, TokenAccounting
from .work_queue import Job, WorkQueue

_MAX_FAILURE_REASONS = 50
OnVotesComplete = Callable[[Solution, ParsedResponse, list[Verification]], Awaitable[None]]
"""Awaited with a solution and all its votes, in the order of their numbers."""


@dataclass(slots=True)
class SamplingCounts:
    """Counts of one run. Tokens are those sampled in this run, not those of reused records."""

    solutions: int = 0
    unusable_solutions: int = 0
    verifications: int = 0
    failed_verifications: int = 0
    reused: int = 0
    """Solutions and verifications that were in the store."""
    reused_verifications: int = 0
    solution_tokens: int = 0
    verification_tokens: int = 0
    saved_verifications: int = 0
    """Verifications not requested because ``stage1.early_stop`` found the solution decided."""
    postponed_verifications: int = 0
    """Verifications not requested because a vote they depend on failed; the next run resumes."""
    engine_failures: dict[str, int] = field(default_factory=dict)
    """Requests that an engine did not serve, by reason with every number written N. Not stored."""

    def add_engine_failure(self, failure: EngineFailure) -> None:
        """Count a failure by its reason; reasons beyond a maximum number count as ``other``."""
        reason = re.sub(r"\d+", "N", str(failure))
        known = reason in self.engine_failures
        if not known and len(self.engine_failures) >= _MAX_FAILURE_REASONS:
            reason = "other"
        self.engine_failures[reason] = self.engine_failures.get(reason, 0) + 1


@dataclass(slots=True)
class _OpenSolution:
    """A usable solution whose votes are being sampled."""

    problem: Problem
    solution: Solution
    parsed: ParsedResponse
    solve_cost: Cost
    verify_cost: Cost = field(default_factory=Cost)
    votes: list[Verification | EngineError | None] = field(default_factory=list)
    """``votes[k]`` is vote k; None while its request is in flight."""
    in_flight: int = 0
    prompt_ids: tuple[int, ...] | None = None


class Stage1Sampler:
    """Samples the solutions and verifications that the store does not have yet.

    ``on_result`` is called with the counts after every result. ``on_votes_complete`` is awaited for
    every solution that has all its votes; it counts as one request in flight. ``earlier`` is the
    store of another run: solutions in it are copied instead of sampled again.
    """

    def __init__(
        self,
        config: Stage1Config,
        seed: int,
        generator: ServedModel,
        verifier: ServedModel,
        store: RecordStore,
        on_result: Callable[[SamplingCounts], None] = lambda counts: None,
        on_votes_complete: OnVotesComplete | None = None,
        earlier: RecordStore | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        self.generator = generator
        self.verifier = verifier
        self.prompts = prompt_set(config.prompt_set)
        self.on_result = on_result
        self.counts = SamplingCounts()
        self.accounting = TokenAccounting(config.solutions_per_problem)
        self._store = SampledStore(store)
        self._earlier = SampledStore(earlier) if earlier is not None else None
        self._stopping_rule = stopping_rule(config)
        self._on_votes_complete = on_votes_complete
        # Parts of the keys: another prompt, model or sampling makes other records.
        self._solution_source = (
            GRAMMAR_VERSION,
            self.prompts.version,
            generator.fingerprint,
            config.generator_sampling.fingerprint(),
        )
        self._verification_source = (
            GRAMMAR_VERSION,
            self.prompts.version,
            verifier.fingerprint,
            config.verifier_sampling.fingerprint(),
        )
        if config.verifier_prompt != "verify":
            self._verification_source += (config.verifier_prompt,)

    def fingerprint(self) -> dict[str, object]:
        """Everything but the problems that determines the results, by setting; plain JSON."""
        return {
            "run.seed": self.seed,
            "stage1.prompt_set": self.prompts.version,
            "the grammar": GRAMMAR_VERSION,
            "models.generator": self.generator.fingerprint,
            "models.verifier": self.verifier.fingerprint,
            "stage1.generator_sampling": self.config.generator_sampling.fingerprint(),
            "stage1.verifier_prompt": self.config.verifier_prompt,
            "stage1.verifier_sampling": self.config.verifier_sampling.fingerprint(),
        }

    async def run(self, problems: Iterable[Problem], max_requests_in_flight: int) -> SamplingCounts:
        """Sample everything that is missing for ``problems``, which are drawn one by one.

        An exception of ``on_result`` or of a full store ends the run in an ``ExceptionGroup``:
        requests in flight are cancelled, stored results stay.
        """
        # In the long run, one request of 1 + N is a solution.
        new_share = max(1, max_requests_in_flight // (1 + self.config.verifications_per_solution))
        self._queue = WorkQueue(max_requests_in_flight, new_share)
        await self._queue.run(self._solution_jobs(problems))
        return self.counts

    def _solution_jobs(self, problems: Iterable[Problem]) -> Iterator[Job]:
        for problem in problems:
            for index in range(self.config.solutions_per_problem):
                yield partial(self._solve, problem, index)

    async def _solve(self, problem: Problem, index: int) -> None:
        """Get or sample one solution, then request its votes."""
        cost = Cost()
        solution = await self._solution(problem, index, cost)
        parsed = parse_solution(solution)
        self.counts.solutions += 1
        if isinstance(parsed, ParseFailure):
            self.counts.unusable_solutions += 1
            self.accounting.add_solution(problem.problem_id, cost, Cost())
            self.on_result(self.counts)
        else:
            self._request_votes(_OpenSolution(problem, solution, parsed, cost))

    async def _solution(self, problem: Problem, index: int, cost: Cost) -> Solution:
        key = content_key(SOLUTION, problem.question, self._solution_source, self.seed, index)

        def make_solution(completion: Completion) -> Solution:
            return Solution(
                key,
                problem.problem_id,
                problem.question,
                completion.text,
                str(completion.generation.finish_reason),
                len(completion.generation.token_ids),
                len(completion.prompt_ids),
            )

        self._copy_from_earlier_run(key)
        result = await self._store.get_or_sample(
            Solution,
            key,
            model=self.generator,
            prompt=self.prompts.solve(problem.question),
            sampling=self.config.generator_sampling,
            make_record=make_solution,
        )
        self._account(result, cost, self.accounting.costs["solve"])
        if isinstance(result, Failed):
            # A stand-in that is not stored: it has no steps, so it counts as unusable.
            reason = str(result.failure)
            return Solution(key, problem.problem_id, problem.question, reason, "abort", 0)
        if isinstance(result, Sampled):
            self.counts.solution_tokens += result.num_tokens
        return result.record

    def _copy_from_earlier_run(self, key: str) -> None:
        if self._earlier is None or self._store.get(Solution, key) is not None:
            return
        solution = self._earlier.get(Solution, key)
        if solution is not None:
            self._store.add(key, solution)

    def _request_votes(self, at: _OpenSolution) -> None:
        """Take the next batch of votes from the store and the verifier, or close the solution."""
        already_begun = bool(at.votes)
        while num_votes := self._next_batch(at):
            numbers = range(len(at.votes), len(at.votes) + num_votes)
            at.votes += [self._stored_vote(at, vote) for vote in numbers]
            missing = [vote for vote in numbers if at.votes[vote] is None]
            if missing:
                at.in_flight = len(missing)
                jobs = [partial(self._sample_vote, at, vote) for vote in missing]
                # Finish this solution before others while the engine still has its prompt cached.
                self._queue.push(jobs, first=already_begun)
                return
        self._close(at)

    def _next_batch(self, at: _OpenSolution) -> int:
        """Number of votes to request together; the next batch is chosen after all have arrived."""
        if self._stopping_rule is None:
            return self.config.verifications_per_solution - len(at.votes)
        if any(isinstance(vote, EngineError) for vote in at.votes):
            # Which votes come next depends on the vote that failed.
            return 0
        return self._stopping_rule.next_batch([vote.outcome for vote in at.votes])

    def _stored_vote(self, at: _OpenSolution, vote: int) -> Verification | None:
        record = self._store.get(Verification, self._vote_key(at, vote))
        if record is None:
            return None
        self._account(Reused(record), at.verify_cost, self.accounting.costs["verify"])
        self.counts.reused_verifications += 1
        self._count_vote(record)
        return record

    async def _sample_vote(self, at: _OpenSolution, vote: int) -> None:
        key = self._vote_key(at, vote)
        if at.prompt_ids is None:
            at.prompt_ids = self.verifier.tokenizer.encode_chat(self._verification_prompt(at))

        def make_verification(completion: Completion) -> Verification:
            num_tokens = len(completion.generation.token_ids)
            outcome = parse_verifier_output(
                completion.text,
                str(completion.generation.finish_reason),
                num_tokens,
                len(at.parsed.steps),
            )
            return Verification(
                key,
                at.solution.key,
                vote,
                completion.text,
                outcome,
                num_tokens,
                len(completion.prompt_ids),
            )

        result = await self._store.get_or_sample(
            Verification,
            key,
            model=self.verifier,
            prompt=at.prompt_ids,
            sampling=self.config.verifier_sampling,
            make_record=make_verification,
            parent=at.solution.key,
        )
        self._account(result, at.verify_cost, self.accounting.costs["verify"])
        if isinstance(result, Failed):
            record: Verification | EngineError = EngineError(str(result.failure))
        else:
            record = result.record
        if isinstance(result, Sampled):
            self.counts.verification_tokens += result.num_tokens
        elif isinstance(result, Reused):
            self.counts.reused_verifications += 1
        at.votes[vote] = record
        self._count_vote(record)
        at.in_flight -= 1
        if at.in_flight == 0:
            self._request_votes(at)

    def _verification_prompt(self, at: _OpenSolution) -> ChatMessages:
        question = at.solution.question
        if self.config.verifier_prompt == "reward_model":
            return self.prompts.reward(Variant.PRM_COT, question, canonical_solution(at.parsed))
        return self.prompts.verify(question, canonical_solution(at.parsed), len(at.parsed.steps))

    def _account(self, result: Reused | Sampled | Failed, *costs: Cost) -> None:
        """Count a result's tokens, seconds and failure."""
        for cost in costs:
            if isinstance(result, Reused):
                cost.add_reused(result.record.num_prompt_tokens, result.record.num_tokens)
            elif isinstance(result, Sampled):
                cost.add_sampled(result.num_prompt_tokens, result.num_tokens, result.seconds)
            else:
                cost.add_failed(result.seconds)
        if isinstance(result, Reused):
            self.counts.reused += 1
        elif isinstance(result, Failed):
            self.counts.add_engine_failure(result.failure)

    def _count_vote(self, vote: Verification | EngineError) -> None:
        self.counts.verifications += 1
        if isinstance(vote, EngineError) or not isinstance(vote.outcome, Verdict):
            self.counts.failed_verifications += 1
        self.on_result(self.counts)

    def _close(self, at: _OpenSolution) -> None:
        """Count a solution that gets no more votes in this run, and pass its votes on."""
        votes = [vote for vote in at.votes if isinstance(vote, Verification)]
        is_complete = len(votes) == len(at.votes)
        not_requested = self.config.verifications_per_solution - len(at.votes)
        if is_complete:
            self.counts.saved_verifications += not_requested
        else:
            self.counts.postponed_verifications += not_requested
        self.accounting.add_solution(
            at.problem.problem_id,
            at.solve_cost,
            at.verify_cost,
            labelled=is_complete,
            votes_saved=not_requested if is_complete else 0,
        )
        if not_requested:
            self.on_result(self.counts)
        if is_complete and self._on_votes_complete is not None:
            job = partial(self._on_votes_complete, at.solution, at.parsed, votes)
            self._queue.push([job], first=True)

    def _vote_key(self, at: _OpenSolution, vote: int) -> str:
        return content_key(
            VERIFICATION, at.solution.key, self._verification_source, self.seed, vote
        )


def parse_solution(solution: Solution) -> ParsedResponse | ParseFailure:
    """The steps of a stored solution; a truncated or aborted one is a ``ParseFailure``."""
    if solution.finish_reason != "stop":
        return ParseFailure(f"finish_reason: {solution.finish_reason}")
    return split_response(solution.text, StepFormat.PLAIN)
