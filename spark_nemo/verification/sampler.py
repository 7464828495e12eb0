"""Stage I's sampling: solutions and their verifications, every one stored as soon as it is there.

A result is stored under a key made of everything that determines it, so a run that was killed, or
grown to more votes, asks only for what is missing. A solution goes to its verifier the moment it is
finished, and its votes, which share their whole prompt, reach the engine one after the other. Of a
solution that is done only counts are kept.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

from spark_nemo.config import Stage1Config
from spark_nemo.engines.base import EngineFailure, EngineLost, FinishReason
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
    EngineError,
    ParseFailure,
    Problem,
    Solution,
    Verdict,
    Verification,
    content_key,
    derive_seed,
)
from spark_nemo.records.store import RecordStore

from .early_stop import stopping_rule
from .token_accounting import Cost, Ledger
from .work_queue import Job, WorkQueue

SOLUTION, VERIFICATION = "solution", "verification"
_MOST_REASONS = 50
AfterVotes = Callable[[Solution, ParsedResponse, list[Verification]], Awaitable[None]]
"""What to do with a solution once all its votes are in, in the order of their numbers."""


@dataclass(slots=True)
class CollectCounts:
    """What one run did; ``sampled`` tokens were paid for now, reused results were not."""

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
    """Not asked for, because ``stage1.early_stop`` found the solution decided."""
    postponed_verifications: int = 0
    """Not asked for, because a vote they depend on could not be had: the next run goes on there."""
    engine_failures: dict[str, int] = field(default_factory=dict)
    """Requests that an engine refused or lost, by its reason with every number written N. Not
    stored: asked again.
    """

    def engine_failed(self, failure: EngineFailure) -> None:
        """Count one by its reason; beyond some number of reasons they are not told apart."""
        reason = re.sub(r"\d+", "N", str(failure))
        if reason not in self.engine_failures and len(self.engine_failures) >= _MOST_REASONS:
            reason = "other"
        self.engine_failures[reason] = self.engine_failures.get(reason, 0) + 1


@dataclass(slots=True)
class _OpenSolution:
    """A usable solution whose votes are being collected; ``votes[k]`` is vote k, None while it is
    in flight.
    """

    solution: Solution
    parsed: ParsedResponse
    solve_cost: Cost
    verify_cost: Cost = field(default_factory=Cost)
    votes: list[Verification | EngineError | None] = field(default_factory=list)
    in_flight: int = 0
    prompt_ids: tuple[int, ...] | None = None


class Collector:
    """Asks generator and verifier for what the store does not hold yet.

    ``after_votes`` is awaited for every solution all of whose votes are in (and not for one that
    lacks a vote because of an ``EngineFailure``), within the bound on requests in flight, so it
    should have one request at a time in flight. ``earlier`` is another run's store: a solution in
    it that is the one to be sampled here is copied instead.
    """

    def __init__(
        self,
        config: Stage1Config,
        seed: int,
        generator: ServedModel,
        verifier: ServedModel,
        store: RecordStore,
        on_result: Callable[[CollectCounts], None] = lambda counts: None,
        after_votes: AfterVotes | None = None,
        earlier: RecordStore | None = None,
    ) -> None:
        self.config, self.seed, self.store, self.on_result = config, seed, store, on_result
        self.generator, self.verifier = generator, verifier
        self.prompts = prompt_set(config.prompt_set)
        self.counts, self.ledger = CollectCounts(), Ledger(config.solutions_per_problem)
        self._rule, self._after_votes = stopping_rule(config), after_votes
        asked = GRAMMAR_VERSION, self.prompts.version
        self._solved_by = (*asked, generator.fingerprint, config.generator_sampling.fingerprint())
        self._verified_by = (*asked, verifier.fingerprint, config.verifier_sampling.fingerprint())
        if config.verifier_prompt != "verify":
            self._verified_by += (config.verifier_prompt,)
        self._earlier = earlier

    def made_by(self) -> dict[str, object]:
        """Everything but the problems that the results depend on, by setting; plain JSON."""
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

    async def run(self, problems: Iterable[Problem], max_requests_in_flight: int) -> CollectCounts:
        """Sample everything missing for ``problems``, drawn one by one; at most so many requests
        are in flight.

        What ``on_result`` or a store that is full raises ends the run, in an ``ExceptionGroup``;
        requests in flight are given up, and what is stored stays.
        """
        # In the long run one request of 1 + N is a solution.
        new_share = max(1, max_requests_in_flight // (1 + self.config.verifications_per_solution))
        self._queue = WorkQueue(max_requests_in_flight, new_share)
        await self._queue.run(self._new_solutions(problems))
        return self.counts

    def _new_solutions(self, problems: Iterable[Problem]) -> Iterator[Job]:
        for problem in problems:
            for index in range(self.config.solutions_per_problem):
                yield partial(self._solve, problem, index)

    async def _solve(self, problem: Problem, index: int) -> None:
        cost = Cost()
        solution = await self._solution(problem, index, cost)
        parsed = parse_solution(solution)
        self.counts.solutions += 1
        if isinstance(parsed, ParseFailure):
            self.counts.unusable_solutions += 1
            self.ledger.solution_done(problem.problem_id, cost, Cost())
            self.on_result(self.counts)
        else:
            self._next_votes(_OpenSolution(solution, parsed, cost))

    async def _solution(self, problem: Problem, index: int, cost: Cost) -> Solution:
        key = content_key(SOLUTION, problem.question, self._solved_by, self.seed, index)
        costs = (cost, self.ledger.parts["solve"])
        if (stored := self._stored_solution(key)) is not None:
            solution = Solution.from_json(stored)
            self.counts.reused += 1
            for each in costs:
                each.add_reused(solution.num_prompt_tokens, solution.num_tokens)
            return solution
        started = time.monotonic()
        try:
            completion = whole(
                await self.generator.complete(
                    self.prompts.solve(problem.question),
                    self.config.generator_sampling,
                    derive_seed(key),
                )
            )
        except EngineLost:  # nobody is left to ask, so all that follow would fail too
            raise
        except EngineFailure as failure:
            self.counts.engine_failed(failure)
            for each in costs:
                each.add_failed(time.monotonic() - started)
            # Not stored: the next run asks again.
            return Solution(key, problem.problem_id, problem.question, str(failure), "abort", 0)
        num_tokens, num_prompt_tokens = (
            len(completion.generation.token_ids),
            len(completion.prompt_ids),
        )
        for each in costs:
            each.add_sampled(num_prompt_tokens, num_tokens, time.monotonic() - started)
        solution = Solution(
            key,
            problem.problem_id,
            problem.question,
            completion.text,
            str(completion.generation.finish_reason),
            num_tokens,
            num_prompt_tokens,
        )
        self.store.append(key, SOLUTION, asdict(solution))
        self.counts.solution_tokens += num_tokens
        return solution

    def _stored_solution(self, key: str) -> dict[str, object] | None:
        stored = self.store.get(key, SOLUTION)
        if (
            stored is None
            and self._earlier is not None
            and (stored := self._earlier.get(key, SOLUTION)) is not None
        ):
            self.store.append(key, SOLUTION, stored)
        return stored

    def _next_votes(self, at: _OpenSolution) -> None:
        """Take the next wave from the store and the verifier, or be done with the solution."""
        begun = bool(at.votes)
        while wave := self._wave(at):
            numbers = range(len(at.votes), len(at.votes) + wave)
            at.votes += [self._stored_vote(at, vote) for vote in numbers]
            if missing := [
                partial(self._ask_verifier, at, vote) for vote in numbers if at.votes[vote] is None
            ]:
                at.in_flight = len(missing)
                # A solution that is begun is finished before others are, while the engine still has
                # its prompt.
                self._queue.push(missing, first=begun)
                return
        self._done(at)

    def _wave(self, at: _OpenSolution) -> int:
        """How many more votes to ask for at once; what is missing of a wave is waited for before
        the next is chosen.

        After a vote that could not be had there is no next wave: which votes it has depends on that
        one.
        """
        if self._rule is None:
            return self.config.verifications_per_solution - len(at.votes)
        if any(isinstance(vote, EngineError) for vote in at.votes):
            return 0
        return self._rule.next_wave([vote.outcome for vote in at.votes])

    def _stored_vote(self, at: _OpenSolution, vote: int) -> Verification | None:
        stored = self.store.get(self._vote_key(at, vote), VERIFICATION)
        if stored is None:
            return None
        record = Verification.from_json(stored)
        self.counts.reused += 1
        self.counts.reused_verifications += 1
        for cost in (at.verify_cost, self.ledger.parts["verify"]):
            cost.add_reused(record.num_prompt_tokens, record.num_tokens)
        self._count_vote(record)
        return record

    async def _ask_verifier(self, at: _OpenSolution, vote: int) -> None:
        if at.prompt_ids is None:
            at.prompt_ids = self.verifier.tokenizer.encode_chat(self._verify_messages(at))
        key, started = self._vote_key(at, vote), time.monotonic()
        costs = (at.verify_cost, self.ledger.parts["verify"])
        try:
            completion = whole(
                await self.verifier.complete_prompt(
                    at.prompt_ids, self.config.verifier_sampling, derive_seed(key)
                )
            )
        except EngineLost:
            raise
        except EngineFailure as failure:
            self.counts.engine_failed(failure)
            at.votes[vote] = EngineError(str(failure))  # not stored: the next run asks again
            for cost in costs:
                cost.add_failed(time.monotonic() - started)
        else:
            num_tokens = len(completion.generation.token_ids)
            outcome = parse_verifier_output(
                completion.text,
                str(completion.generation.finish_reason),
                num_tokens,
                len(at.parsed.steps),
            )
            record = Verification(
                key, at.solution.key, vote, completion.text, outcome, num_tokens, len(at.prompt_ids)
            )
            self.store.append(key, VERIFICATION, record.to_json(), parent=at.solution.key)
            self.counts.verification_tokens += num_tokens
            for cost in costs:
                cost.add_sampled(len(at.prompt_ids), num_tokens, time.monotonic() - started)
            at.votes[vote] = record
        self._count_vote(at.votes[vote])
        at.in_flight -= 1
        if at.in_flight == 0:
            self._next_votes(at)

    def _verify_messages(self, at: _OpenSolution) -> ChatMessages:
        if self.config.verifier_prompt == "reward_model":
            return self.prompts.reward(
                Variant.PRM_COT, at.solution.question, canonical_solution(at.parsed)
            )
        return self.prompts.verify(
            at.solution.question, canonical_solution(at.parsed), len(at.parsed.steps)
        )

    def _count_vote(self, vote: Verification | EngineError) -> None:
        self.counts.verifications += 1
        self.counts.failed_verifications += isinstance(vote, EngineError) or not isinstance(
            vote.outcome, Verdict
        )
        self.on_result(self.counts)

    def _done(self, at: _OpenSolution) -> None:
        """No more votes on this solution in this run."""
        votes = [vote for vote in at.votes if isinstance(vote, Verification)]
        complete = len(votes) == len(at.votes)
        unasked = self.config.verifications_per_solution - len(at.votes)
        if complete:
            self.counts.saved_verifications += unasked
        else:
            self.counts.postponed_verifications += unasked
        self.ledger.solution_done(
            at.solution.problem_id,
            at.solve_cost,
            at.verify_cost,
            labelled=complete,
            votes_saved=unasked if complete else 0,
        )
        if unasked:
            self.on_result(self.counts)
        if complete and self._after_votes is not None:
            self._queue.push(
                [partial(self._after_votes, at.solution, at.parsed, votes)], first=True
            )

    def _vote_key(self, at: _OpenSolution, vote: int) -> str:
        return content_key(VERIFICATION, at.solution.key, self._verified_by, self.seed, vote)


def whole(completion: Completion) -> Completion:
    """``completion``; raises ``EngineFailure`` for one that was aborted, of which nothing may be
    kept.
    """
    if completion.generation.finish_reason is FinishReason.ABORT:
        raise EngineFailure(f"aborted after {len(completion.generation.token_ids)} tokens")
    return completion


def parse_solution(solution: Solution) -> ParsedResponse | ParseFailure:
    """The steps of a stored solution, or why it has none; a truncated or aborted one has none."""
    if solution.finish_reason != "stop":
        return ParseFailure(f"finish_reason: {solution.finish_reason}")
    return split_response(solution.text, StepFormat.PLAIN)
