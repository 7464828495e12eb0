"""Sampling of meta-critique: a verification is criticised, then merged with its critique.

The verifications are the ones that the configured vote choices pick. Each gets one critique and one
merge, greedily unless configured otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spark_nemo.config import LabelsConfig, Stage1Config
from spark_nemo.engines.served_model import Completion, ServedModel
from spark_nemo.grammar import (
    GRAMMAR_VERSION,
    ParsedResponse,
    canonical_solution,
    critique_prompts,
    parse_verifier_output,
)
from spark_nemo.grammar.verification import after_thinking
from spark_nemo.records import (
    CRITIQUE,
    MERGE,
    Critique,
    Merge,
    MetaCritique,
    ParseFailure,
    Solution,
    Verdict,
    Verification,
    content_key,
)
from spark_nemo.records.store import RecordStore

from .labelling import choose_vote, critique_text
from .sampled_store import Failed, Record, Reused, Sampled, SampledStore
from .vote_choice import Dropped


@dataclass(slots=True)
class MetaCritiqueCounts:
    """Counts of one run. Tokens are those sampled in this run."""

    critiques: int = 0
    failed_critiques: int = 0
    merges: int = 0
    failed_merges: int = 0
    nothing_chosen: int = 0
    """Vote choices that dropped the solution, so that no verification is criticised."""
    reused: int = 0
    tokens: int = 0


class MetaCritiqueSampler:
    """Samples the critiques and merges that the store does not have yet."""

    def __init__(
        self,
        config: Stage1Config,
        labels: LabelsConfig,
        seed: int,
        critic: ServedModel,
        store: RecordStore,
    ) -> None:
        self.config = config
        self.labels = labels
        self.seed = seed
        self.critic = critic
        self.prompts = critique_prompts(config.prompt_set)
        self.counts = MetaCritiqueCounts()
        self._sampling = config.revised_with
        self._store = SampledStore(store)
        self._source = (
            GRAMMAR_VERSION,
            self.prompts.version,
            critic.fingerprint,
            self._sampling.fingerprint(),
        )

    def fingerprint(self) -> dict[str, object]:
        """Everything but the verifications that determines the results, by setting; plain JSON."""
        return {
            "the critique and merge prompts": self.prompts.version,
            "models.critic": self.critic.fingerprint,
            "stage1.revision_sampling": self._sampling.fingerprint(),
        }

    async def sample(
        self, solution: Solution, parsed: ParsedResponse, votes: Sequence[Verification]
    ) -> None:
        """Get or sample critique and merge of every chosen vote, one request at a time."""
        chosen: dict[str, Verification] = {}
        for name in self.config.meta_critique:
            choice = choose_vote(name, solution, votes, self.seed, self.labels)
            if isinstance(choice, Dropped):
                self.counts.nothing_chosen += 1
            else:
                chosen[choice.verification.key] = choice.verification
        # Several choices may fall on the same vote.
        for verification in chosen.values():
            await self._sample_one(solution, parsed, verification)

    async def _sample_one(
        self, solution: Solution, parsed: ParsedResponse, verification: Verification
    ) -> None:
        original = after_thinking(verification.text)
        assert not isinstance(original, ParseFailure), "a chosen verification has been parsed"
        original = original.strip()
        critique = await self._critique(solution, parsed, verification, original)
        self.counts.critiques += 1
        text = critique_text(critique) if critique is not None else None
        if critique is None or isinstance(text, Dropped):
            self.counts.failed_critiques += 1
            return
        merge = await self._merge(solution, parsed, verification, original, critique, text)
        self.counts.merges += 1
        if merge is None or not isinstance(merge.outcome, Verdict):
            self.counts.failed_merges += 1

    async def _critique(
        self,
        solution: Solution,
        parsed: ParsedResponse,
        verification: Verification,
        original: str,
    ) -> Critique | None:
        """Critique of a verification; None if the engine failed."""
        key = content_key(CRITIQUE, verification.key, self._source, self.seed)

        def make_critique(completion: Completion) -> Critique:
            return Critique(
                key,
                solution.key,
                verification.key,
                completion.text,
                str(completion.generation.finish_reason),
                len(completion.generation.token_ids),
            )

        result = await self._store.get_or_sample(
            Critique,
            key,
            model=self.critic,
            prompt=self.prompts.critique(solution.question, canonical_solution(parsed), original),
            sampling=self._sampling,
            make_record=make_critique,
            parent=solution.key,
        )
        return self._counted(result)

    async def _merge(
        self,
        solution: Solution,
        parsed: ParsedResponse,
        verification: Verification,
        original: str,
        critique: Critique,
        critique_body: str,
    ) -> Merge | None:
        """Merge of a verification and its critique; None if the engine failed."""
        key = content_key(MERGE, critique.key, self._source, self.seed)
        num_steps = len(parsed.steps)

        def make_merge(completion: Completion) -> Merge:
            num_tokens = len(completion.generation.token_ids)
            outcome = parse_verifier_output(
                completion.text, str(completion.generation.finish_reason), num_tokens, num_steps
            )
            return Merge(
                key,
                solution.key,
                verification.key,
                critique.key,
                completion.text,
                outcome,
                num_tokens,
            )

        result = await self._store.get_or_sample(
            Merge,
            key,
            model=self.critic,
            prompt=self.prompts.merge(
                solution.question, canonical_solution(parsed), original, critique_body, num_steps
            ),
            sampling=self._sampling,
            make_record=make_merge,
            parent=solution.key,
        )
        return self._counted(result)

    def _counted(self, result: Reused[Record] | Sampled[Record] | Failed) -> Record | None:
        if isinstance(result, Failed):
            return None
        if isinstance(result, Reused):
            self.counts.reused += 1
        else:
            self.counts.tokens += result.num_tokens
        return result.record


def stored_meta_critiques(store: RecordStore, solution_key: str) -> dict[str, MetaCritique]:
    """Critiques and merges of a solution, by the key of the verification they are about."""
    critiques = [Critique.from_json(row) for _, row in store.children(solution_key, CRITIQUE)]
    merges = [Merge.from_json(row) for _, row in store.children(solution_key, MERGE)]
    merge_of = {merge.critique_key: merge for merge in merges}
    return {
        critique.verification_key: MetaCritique(critique, merge_of.get(critique.key))
        for critique in critiques
    }
