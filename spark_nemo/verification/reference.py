"""Sampling for the declared baseline: verifications whose prompt holds the expected answer.

Nothing here has an answer or a place for one. ``ask`` makes the prompt of a solution; whoever built
it (a stage, from an answer file that the configuration names) put the answer in. The results are
stored under a kind of their own and read back as a type of their own, which no reference-free
method accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spark_nemo.config import Stage1Config
from spark_nemo.engines.base import EngineFailure, EngineLost, FinishReason
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import GRAMMAR_VERSION, ChatMessages, ParsedResponse, parse_verifier_output
from spark_nemo.records import (
    ReferenceVerification,
    Solution,
    Verdict,
    Verification,
    content_key,
    derive_seed,
)
from spark_nemo.records.store import RecordStore

REFERENCE_VERIFICATION = "reference_verification"
AskWithAnswer = Callable[[Solution, ParsedResponse], ChatMessages]


@dataclass(slots=True)
class ReferenceCounts:
    """What one run did. ``tokens`` were generated now; reused verifications cost nothing."""

    verifications: int = 0
    failed_verifications: int = 0
    reused: int = 0
    tokens: int = 0


class ReferenceVerifier:
    """Asks for the verifications that the store does not hold yet. ``verify`` has one request at a
    time in flight.
    """

    def __init__(
        self,
        config: Stage1Config,
        seed: int,
        verifier: ServedModel,
        ask: AskWithAnswer,
        store: RecordStore,
        on_result: Callable[[ReferenceCounts], None] = lambda counts: None,
    ) -> None:
        self.config, self.seed, self.verifier, self.ask = config, seed, verifier, ask
        self.store, self.on_result = store, on_result
        self.counts = ReferenceCounts()
        self._made_by = (
            GRAMMAR_VERSION,
            verifier.fingerprint,
            config.verifier_sampling.fingerprint(),
        )

    async def verify(
        self, solution: Solution, parsed: ParsedResponse, votes: Sequence[Verification] = ()
    ) -> None:
        """The configured number of verifications of one solution; ``votes``, made without the
        answer, are not read.
        """
        messages = self.ask(solution, parsed)
        for vote in range(self.config.num_reference_verifications):
            # The prompt as sent, answer and all, is part of the key: another answer makes another
            # record.
            key = content_key(
                REFERENCE_VERIFICATION,
                solution.key,
                content_key(messages),
                self._made_by,
                self.seed,
                vote,
            )
            stored = self.store.get(key, REFERENCE_VERIFICATION)
            if stored is not None:
                self.counts.reused += 1
                record: Verification | None = ReferenceVerification.from_json(stored)
            else:
                record = await self._ask_verifier(key, solution, parsed, messages, vote)
            self.counts.verifications += 1
            self.counts.failed_verifications += record is None or not isinstance(
                record.outcome, Verdict
            )
        self.on_result(self.counts)

    async def _ask_verifier(
        self,
        key: str,
        solution: Solution,
        parsed: ParsedResponse,
        messages: ChatMessages,
        vote: int,
    ) -> Verification | None:
        """None when the engine failed: nothing is stored then, and the next run asks again."""
        try:
            done = await self.verifier.complete(
                messages, self.config.verifier_sampling, derive_seed(key)
            )
        except EngineLost:  # nobody is left to ask, so all that follow would fail too
            raise
        except EngineFailure:
            return None
        if done.generation.finish_reason is FinishReason.ABORT:
            return None
        num_tokens = len(done.generation.token_ids)
        outcome = parse_verifier_output(
            done.text, str(done.generation.finish_reason), num_tokens, len(parsed.steps)
        )
        record = ReferenceVerification(key, solution.key, vote, done.text, outcome, num_tokens)
        self._keep(key, record, solution)
        return record

    def _keep(self, key: str, record: Verification, solution: Solution) -> None:
        self.store.append(key, REFERENCE_VERIFICATION, record.to_json(), parent=solution.key)
        self.counts.tokens += record.num_tokens


def reference_verifications_of(
    store: RecordStore, solution_key: str
) -> list[ReferenceVerification]:
    """What the store holds of a solution for the reference-guided baseline."""
    return [
        ReferenceVerification.from_json(row)
        for _, row in store.children(solution_key, REFERENCE_VERIFICATION)
    ]
