"""Sampling for the reference-guided baseline: verifications whose prompt holds the expected answer.

This module has no answers: the function that makes the prompt puts them in
(``answer_key_baselines``). The records are a kind and a type of their own, which no reference-free
label method accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spark_nemo.config import Stage1Config
from spark_nemo.engines.served_model import Completion, ServedModel
from spark_nemo.grammar import GRAMMAR_VERSION, ChatMessages, ParsedResponse, parse_verifier_output
from spark_nemo.records import (
    REFERENCE_VERIFICATION,
    ReferenceVerification,
    Solution,
    Verdict,
    content_key,
)
from spark_nemo.records.store import RecordStore

from .sampled_store import Failed, Reused, Sampled, SampledStore

MakePrompt = Callable[[Solution, ParsedResponse], ChatMessages]


@dataclass(slots=True)
class ReferenceCounts:
    """Counts of one run. Tokens are those sampled in this run."""

    verifications: int = 0
    failed_verifications: int = 0
    reused: int = 0
    tokens: int = 0


class ReferenceSampler:
    """Samples the verifications with the expected answer that the store does not have yet."""

    def __init__(
        self,
        config: Stage1Config,
        seed: int,
        verifier: ServedModel,
        make_prompt: MakePrompt,
        store: RecordStore,
    ) -> None:
        self.config = config
        self.seed = seed
        self.verifier = verifier
        self.counts = ReferenceCounts()
        self._make_prompt = make_prompt
        self._store = SampledStore(store)
        self._source = (
            GRAMMAR_VERSION,
            verifier.fingerprint,
            config.verifier_sampling.fingerprint(),
        )

    async def sample(self, solution: Solution, parsed: ParsedResponse) -> None:
        """Get or sample the configured number of verifications, one request at a time."""
        prompt = self._make_prompt(solution, parsed)
        for vote in range(self.config.num_reference_verifications):
            # The prompt, answer included, is part of the key: another answer is another record.
            key = content_key(
                REFERENCE_VERIFICATION,
                solution.key,
                content_key(prompt),
                self._source,
                self.seed,
                vote,
            )
            await self._sample_vote(key, vote, solution, parsed, prompt)

    async def _sample_vote(
        self,
        key: str,
        vote: int,
        solution: Solution,
        parsed: ParsedResponse,
        prompt: ChatMessages,
    ) -> None:
        def make_verification(completion: Completion) -> ReferenceVerification:
            num_tokens = len(completion.generation.token_ids)
            outcome = parse_verifier_output(
                completion.text,
                str(completion.generation.finish_reason),
                num_tokens,
                len(parsed.steps),
            )
            return ReferenceVerification(
                key, solution.key, vote, completion.text, outcome, num_tokens
            )

        result = await self._store.get_or_sample(
            ReferenceVerification,
            key,
            model=self.verifier,
            prompt=prompt,
            sampling=self.config.verifier_sampling,
            make_record=make_verification,
            parent=solution.key,
        )
        self.counts.verifications += 1
        if isinstance(result, Failed) or not isinstance(result.record.outcome, Verdict):
            self.counts.failed_verifications += 1
        if isinstance(result, Reused):
            self.counts.reused += 1
        elif isinstance(result, Sampled):
            self.counts.tokens += result.num_tokens


def stored_reference_verifications(
    store: RecordStore, solution_key: str
) -> list[ReferenceVerification]:
    """The verifications of a solution that saw the expected answer."""
    return [
        ReferenceVerification.from_json(row)
        for _, row in store.children(solution_key, REFERENCE_VERIFICATION)
    ]
