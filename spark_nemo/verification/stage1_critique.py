"""Sampling with the critic after a solution's votes: meta-critique and the reference-guided baseline.

With ``stage1.reference_answers`` this is where answers reach stage I, inside a function that makes
the prompts (``answer_key_baselines``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import ParsedResponse, critique_prompts
from spark_nemo.records import Solution, Verification
from spark_nemo.records.store import RecordStore

from .answer_key_baselines import reference_guided_prompt
from .meta_critique import MetaCritiqueSampler
from .reference import ReferenceSampler
from .stage1_monitor import FailureCount


def build_stage1_critic(
    config: SparkConfig, verifier: ServedModel, store: RecordStore, log_dir: Path
) -> Stage1Critic | None:
    """The critic of stage I, or None if the configuration needs votes alone.

    ``models.critic`` is loaded only when needed; without it the verifier is the critic.
    """
    if not config.stage1.meta_critique and config.stage1.reference_answers is None:
        return None
    critic = verifier
    if config.models.critic not in (None, config.models.verifier):
        critic = ServedModel.load(
            config.engine, config.models.critic, "verifier", log_dir / "critic"
        )
    return Stage1Critic(config, critic, store)


class Stage1Critic:
    """Samples everything that needs a solution's votes first; ``sample`` is the sampler's callback."""

    def __init__(self, config: SparkConfig, critic: ServedModel, store: RecordStore) -> None:
        stage = config.stage1
        seed = config.run.seed
        self.critic = critic
        self._stage = stage
        self._meta_critique: MetaCritiqueSampler | None = None
        self._reference: ReferenceSampler | None = None
        if stage.meta_critique:
            self._meta_critique = MetaCritiqueSampler(stage, config.labels, seed, critic, store)
        if stage.reference_answers is not None:
            make_prompt = reference_guided_prompt(stage.reference_answers, stage.prompt_set)
            self._reference = ReferenceSampler(stage, seed, critic, make_prompt, store)

    async def sample(
        self, solution: Solution, parsed: ParsedResponse, votes: Sequence[Verification]
    ) -> None:
        """Sample what is missing for one solution, one request at a time."""
        if self._meta_critique is not None:
            await self._meta_critique.sample(solution, parsed, votes)
        if self._reference is not None:
            await self._reference.sample(solution, parsed)

    def fingerprint(self) -> dict[str, object]:
        """Everything but the verifications that determines the results, by setting; plain JSON."""
        fingerprint: dict[str, object] = {}
        if self._meta_critique is not None:
            fingerprint |= self._meta_critique.fingerprint()
        if self._reference is not None:
            answers = Path(str(self._stage.reference_answers)).read_bytes()
            fingerprint |= {
                "models.critic": self.critic.fingerprint,
                "stage1.reference_answers": hashlib.sha256(answers).hexdigest()[:12],
                "the reference prompt": critique_prompts(self._stage.prompt_set).version,
            }
        return fingerprint

    def statistics(self) -> dict[str, object]:
        """Counts for the statistics file, which also says where answer keys were read."""
        statistics: dict[str, object] = {}
        if self._meta_critique is not None:
            statistics["meta_critique"] = asdict(self._meta_critique.counts)
        if self._reference is not None:
            statistics["reference_guided"] = {
                **asdict(self._reference.counts),
                "reads_answer_keys": self._stage.reference_answers,
            }
        return statistics

    def failure_counts(self) -> list[FailureCount]:
        """Failures of each kind of text."""
        failures: list[FailureCount] = []
        if self._meta_critique is not None:
            counts = self._meta_critique.counts
            failures.append(("critiques", counts.failed_critiques, counts.critiques))
            failures.append(("merges", counts.failed_merges, counts.merges))
        if self._reference is not None:
            counts = self._reference.counts
            failures.append(
                (
                    "reference-guided verifications",
                    counts.failed_verifications,
                    counts.verifications,
                )
            )
        return failures
