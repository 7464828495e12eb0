"""Client of the reward model: single flight, cache, and a deadline for every verification.

The service is between the judge and the engine, which may be slow, full or down. The cache adds no
randomness: a cached result is what the same request with the same seed returned before. On an
engine that honours seeds (embedded, vLLM), rewards equal those of a run without the cache. SGLang
samples again on every request, and there a cached result is one of the possible results.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import cached_property

from spark_nemo.config import SamplingConfig
from spark_nemo.config.reward import ModelReward
from spark_nemo.engines.base import EngineFailure, EngineLost
from spark_nemo.engines.fleet import TOKEN_TIMEOUT_S
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import GRAMMAR_VERSION, PromptSet, Variant, parse_verifier_output
from spark_nemo.records import EngineError, VariantOutcome, content_key

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of a ``PRMService``."""

    queue: int = 1024
    """Maximum verifications at the engine at once."""
    deadline: float = 1800.0
    """Maximum seconds of one verification."""
    cache_entries: int = 65536
    """Maximum cached verifications."""

    def __post_init__(self) -> None:
        if self.queue < 1 or self.deadline <= 0 or self.cache_entries < 0:
            raise ValueError(
                f"{self}: queue at least 1, deadline positive, cache_entries at least 0"
            )

    @classmethod
    def from_config(cls, reward: ModelReward, slots: int) -> ServiceLimits:
        """Return the configured limits for engines that decode ``slots`` verifications together."""
        # auto keeps the engines full: one slot's request decodes, one waits at the engine. Others
        # wait here, where the deadline has not begun yet.
        queue = 2 * slots if reward.queue == "auto" else reward.queue
        deadline = reward.deadline_s
        if deadline == "auto":
            deadline = cls().deadline + TOKEN_TIMEOUT_S * reward.sampling.max_new_tokens
        return cls(queue, deadline, reward.cache)


@dataclass(frozen=True, slots=True)
class Answer:
    """Outcome of one verification and the tokens it took, also for a cached result."""

    outcome: VariantOutcome
    num_tokens: int


@dataclass(frozen=True)
class Case:
    """Canonical text of one response to verify; all votes and attempts share its encoded prompt."""

    question: str
    canonical: str
    num_steps: int
    prompts: PromptSet
    served: ServedModel
    variant: Variant = Variant.PRM_COT

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the variant's prompt; equal ids let an engine reuse the prefix."""
        messages = self.prompts.reward(self.variant, self.question, self.canonical)
        return self.served.tokenizer.encode_chat(messages)


@dataclass(slots=True)
class _Flight:
    """Request in flight and the number of callers that wait for it."""

    task: asyncio.Task[Answer]
    waiting: int = 0


@dataclass(slots=True)
class ServiceCounts:
    """Requests since the last ``take_counts`` by origin of their answer, and sampled tokens."""

    asked: int = 0
    remembered: int = 0
    shared: int = 0
    sampled_tokens: int = 0
    deadline_missed: int = 0
    engine_errors: int = 0

    def metrics(self) -> dict[str, float]:
        """Return the counts and ``hit_rate``, the share of requests answered without the engine."""
        saved = self.remembered + self.shared
        return {
            **{name: float(value) for name, value in asdict(self).items()},
            "hit_rate": saved / self.asked if self.asked else 0.0,
        }


class PRMService:
    """Client of one served reward model, with its kind's prompt and parser.

    It belongs to the event loop of its first use.

    Verdicts, parse failures and truncations are cached: the same request with the same seed, or
    greedily, would return the same result. An ``EngineError`` does not depend on the content and is
    never cached. The key consists of the content (question, canonical response, number of steps,
    prompt set, grammar), the kind of reward model, its fingerprint and weight version, and the
    sampling with its seed. The seed depends on vote and attempt; a greedy request has none.
    """

    def __init__(
        self,
        served: ServedModel,
        prompts: PromptSet,
        sampling: SamplingConfig,
        limits: ServiceLimits = ServiceLimits(),
        variant: Variant = Variant.PRM_COT,
    ) -> None:
        self.served, self.prompts, self.sampling, self.limits = served, prompts, sampling, limits
        self.variant = Variant(variant)
        self._slots = asyncio.Semaphore(limits.queue)
        self._remembered: OrderedDict[str, Answer] = OrderedDict()
        self._flights: dict[str, _Flight] = {}
        self._version: int | None = None
        self._counts = ServiceCounts()

    async def refresh(self) -> None:
        """Read the engine's weight version before a batch; results of other versions are not used.

        The cache is off until the first call, and while the engine does not report its version.
        """
        try:
            health = await self.served.engine.health()
            self._version = health.weight_version if health.alive else None
        except EngineFailure as failure:
            log.info("the verifier's engine has no health to report: %s", failure)
            self._version = None
        if self._version is None:
            log.warning(
                "the verifier does not say its weight version: "
                "nothing is taken from the cache until it does"
            )

    def case(self, question: str, canonical: str, num_steps: int) -> Case:
        """Return a response to pass to ``verify``, once or several times."""
        return Case(question, canonical, num_steps, self.prompts, self.served, self.variant)

    async def verify(self, case: Case, seed: int) -> Answer:
        """Return the verification of ``case`` sampled with ``seed``.

        A request that equals one in flight shares its answer. A request is cancelled once all its
        callers are cancelled. Raises only ``EngineLost``, for a pool without servers.
        """
        self._counts.asked += 1
        if self._version is None or not self.limits.cache_entries:
            return await self._ask(case, seed)
        key = self._key(case, seed, self._version)
        if key in self._remembered:
            self._counts.remembered += 1
            self._remembered.move_to_end(key)
            return self._remembered[key]
        if (flight := self._flights.get(key)) is not None:
            self._counts.shared += 1
        else:
            flight = self._flights[key] = _Flight(
                asyncio.create_task(self._fly(key, case, seed, self._version))
            )
        return await self._wait(key, flight)

    def take_counts(self) -> ServiceCounts:
        """Return the counts since the last call, and reset them."""
        counts, self._counts = self._counts, ServiceCounts()
        return counts

    def _key(self, case: Case, seed: int, version: int) -> str:
        drawn = None if self.sampling.temperature == 0 else seed
        return content_key(
            "prm",
            self.variant,
            self.served.fingerprint,
            version,
            GRAMMAR_VERSION,
            self.prompts.version,
            self.sampling.fingerprint(),
            drawn,
            case.question,
            case.canonical,
            case.num_steps,
        )

    async def _wait(self, key: str, flight: _Flight) -> Answer:
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # A later caller must not join a request that is about to end.
                self._flights.pop(key, None)
                flight.task.cancel()
                await asyncio.wait([flight.task])

    async def _fly(self, key: str, case: Case, seed: int, version: int) -> Answer:
        try:
            answer, versions = await self._sample(case, seed)
        finally:
            if (
                flight := self._flights.get(key)
            ) is not None and flight.task is asyncio.current_task():
                del self._flights[key]
        # A result sampled while the weights changed belongs to neither version: do not cache it.
        if not isinstance(answer.outcome, EngineError) and versions <= {version}:
            self._remembered[key] = answer
            if len(self._remembered) > self.limits.cache_entries:
                self._remembered.popitem(last=False)
        return answer

    async def _ask(self, case: Case, seed: int) -> Answer:
        answer, _ = await self._sample(case, seed)
        return answer

    async def _sample(self, case: Case, seed: int) -> tuple[Answer, set[int]]:
        """Wait for one of the engine's slots; return the answer and the weight versions used."""
        async with self._slots:
            try:
                async with asyncio.timeout(self.limits.deadline) as clock:
                    done = await self.served.complete_prompt(case.prompt_ids, self.sampling, seed)
            except EngineLost:  # not a failed verification: no server is left
                raise
            except EngineFailure as failure:
                self._counts.engine_errors += 1
                return Answer(EngineError(str(failure)), 0), set()
            except TimeoutError:
                if not clock.expired():
                    raise  # not this deadline: a bug in the engine's client
                self._counts.deadline_missed += 1
                return Answer(
                    EngineError(
                        f"deadline: no verification within {self.limits.deadline:g} s "
                        "(rl.reward.deadline_s)"
                    ),
                    0,
                ), set()
        num_tokens = len(done.generation.token_ids)
        self._counts.sampled_tokens += num_tokens
        reason = str(done.generation.finish_reason)
        outcome = parse_verifier_output(done.text, reason, num_tokens, case.num_steps, self.variant)
        return Answer(outcome, num_tokens), set(done.generation.weight_versions)
