"""Meta-critique's sampling: verification -> critique -> merge, of the verifications that the
configuration picks.

Both texts are stored under keys made of everything that determines them, so a run that was killed
asks only for what is missing. Of each verification one critique and one merge are asked for,
greedily unless configured otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from spark_nemo.config import Stage1Config
from spark_nemo.engines.base import EngineFailure, EngineLost, FinishReason
from spark_nemo.engines.served_model import Completion, ServedModel
from spark_nemo.grammar import (
    GRAMMAR_VERSION,
    ChatMessages,
    ParsedResponse,
    canonical_solution,
    parse_verifier_output,
    revision_prompts,
)
from spark_nemo.grammar.verification import after_thinking
from spark_nemo.records import (
    Critique,
    Merge,
    ParseFailure,
    Revision,
    Solution,
    Verdict,
    Verification,
    content_key,
    derive_seed,
)
from spark_nemo.records.store import RecordStore

from .labelling import critique_text, pick_verification
from .vote_choice import Dropped, LabelOptions

CRITIQUE, MERGE = "critique", "merge"


@dataclass(slots=True)
class RevisionCounts:
    """What one run did. ``tokens`` were generated now; reused texts cost nothing."""

    critiques: int = 0
    failed_critiques: int = 0
    merges: int = 0
    failed_merges: int = 0
    nothing_picked: int = 0
    """Solutions without a label by the way of picking, so without a verification to criticise."""
    reused: int = 0
    tokens: int = 0


class Reviser:
    """Asks the critic for what the store does not hold yet. ``revise`` has one request at a time in
    flight.
    """

    def __init__(
        self,
        config: Stage1Config,
        options: LabelOptions,
        seed: int,
        critic: ServedModel,
        store: RecordStore,
        on_result: Callable[[RevisionCounts], None] = lambda counts: None,
    ) -> None:
        self.config, self.options, self.seed = config, options, seed
        self.critic, self.store, self.on_result = critic, store, on_result
        self.prompts = revision_prompts(config.prompt_set)
        self.counts = RevisionCounts()
        self._made_by = (
            GRAMMAR_VERSION,
            self.prompts.version,
            critic.fingerprint,
            config.revised_with.fingerprint(),
        )

    def made_by(self) -> dict[str, object]:
        """Everything but the verifications that the results depend on, by setting; plain JSON."""
        return {
            "the critique and merge prompts": self.prompts.version,
            "models.critic": self.critic.fingerprint,
            "stage1.revision_sampling": self.config.revised_with.fingerprint(),
        }

    async def revise(
        self, solution: Solution, parsed: ParsedResponse, votes: Sequence[Verification]
    ) -> None:
        """Critique and merge of every verification that ``stage1.meta_critique`` picks among ``votes``,
        each only once.
        """
        picked: dict[str, Verification] = {}
        for pick in self.config.meta_critique:
            chosen = pick_verification(pick, solution, votes, self.seed, self.options)
            if isinstance(chosen, Dropped):
                self.counts.nothing_picked += 1
            else:
                picked[chosen.verification.key] = chosen.verification
        for verification in picked.values():
            await self._revise_one(solution, parsed, verification)
        self.on_result(self.counts)

    async def _revise_one(
        self, solution: Solution, parsed: ParsedResponse, verification: Verification
    ) -> None:
        original = after_thinking(verification.text)
        assert not isinstance(original, ParseFailure), "a picked verification has been parsed"
        critique = await self._critique(solution, parsed, verification, original.strip())
        said = critique_text(critique) if critique is not None else Dropped("critique_engine_error")
        self.counts.critiques += 1
        if isinstance(said, Dropped):
            self.counts.failed_critiques += 1
            return
        assert critique is not None
        merge = await self._merge(solution, parsed, verification, original.strip(), critique, said)
        self.counts.merges += 1
        self.counts.failed_merges += merge is None or not isinstance(merge.outcome, Verdict)

    async def _critique(
        self,
        solution: Solution,
        parsed: ParsedResponse,
        verification: Verification,
        original: str,
    ) -> Critique | None:
        key = content_key(CRITIQUE, verification.key, self._made_by, self.seed)
        if (stored := self.store.get(key, CRITIQUE)) is not None:
            self.counts.reused += 1
            return Critique.from_json(stored)
        done = await self._ask(
            key, self.prompts.critique(solution.question, canonical_solution(parsed), original)
        )
        if done is None:
            return None
        record = Critique(
            key,
            solution.key,
            verification.key,
            done.text,
            str(done.generation.finish_reason),
            len(done.generation.token_ids),
        )
        self._keep(key, CRITIQUE, asdict(record), solution)
        return record

    async def _merge(
        self,
        solution: Solution,
        parsed: ParsedResponse,
        verification: Verification,
        original: str,
        critique: Critique,
        said: str,
    ) -> Merge | None:
        key = content_key(MERGE, critique.key, self._made_by, self.seed)
        if (stored := self.store.get(key, MERGE)) is not None:
            self.counts.reused += 1
            return Merge.from_json(stored)
        num_steps = len(parsed.steps)
        done = await self._ask(
            key,
            self.prompts.merge(
                solution.question, canonical_solution(parsed), original, said, num_steps
            ),
        )
        if done is None:
            return None
        num_tokens = len(done.generation.token_ids)
        outcome = parse_verifier_output(
            done.text, str(done.generation.finish_reason), num_tokens, num_steps
        )
        record = Merge(
            key, solution.key, verification.key, critique.key, done.text, outcome, num_tokens
        )
        self._keep(key, MERGE, record.to_json(), solution)
        return record

    async def _ask(self, key: str, messages: ChatMessages) -> Completion | None:
        """None when the engine failed: nothing is stored then, and the next run asks again."""
        try:
            done = await self.critic.complete(messages, self.config.revised_with, derive_seed(key))
        except EngineLost:  # nobody is left to ask, so all that follow would fail too
            raise
        except EngineFailure:
            return None
        return None if done.generation.finish_reason is FinishReason.ABORT else done

    def _keep(self, key: str, kind: str, payload: dict[str, object], solution: Solution) -> None:
        self.store.append(key, kind, payload, parent=solution.key)
        self.counts.tokens += int(payload["num_tokens"])  # type: ignore[call-overload]


def revisions_of(store: RecordStore, solution_key: str) -> dict[str, Revision]:
    """A solution's critiques and merges, by the key of the verification they are about."""
    critiques = [Critique.from_json(row) for _, row in store.children(solution_key, CRITIQUE)]
    merges = {
        str(row["critique_key"]): Merge.from_json(row)
        for _, row in store.children(solution_key, MERGE)
    }
    return {
        critique.verification_key: Revision(critique, merges.get(critique.key))
        for critique in critiques
    }
