"""What stage I does with a solution once its votes are in: critique and merge, and the
reference-guided baseline.

This is where an answer may reach stage I, if the configuration names ``stage1.reference_answers``:
it is read through evaluation's answer keys, put into a prompt here, and handed on as a closure.
What comes of it is stored under a kind that no reference-free method reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spark_nemo.config import SparkConfig
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.grammar import ParsedResponse, revision_prompts
from spark_nemo.records import Solution, Verification
from spark_nemo.records.store import RecordStore

from .answer_key_baselines import reference_guided_prompt
from .meta_critique import Reviser
from .reference import ReferenceVerifier
from .vote_choice import LabelOptions


class AfterVotes:
    """Awaited by the collector for every solution whose votes are all in; one request at a time is
    in flight each.
    """

    def __init__(self, config: SparkConfig, critic: ServedModel, store: RecordStore) -> None:
        stage, seed = config.stage1, config.run.seed
        self.critic, self._config = critic, config
        self.reviser = (
            Reviser(stage, LabelOptions.of(config.labels), seed, critic, store)
            if stage.meta_critique
            else None
        )
        self.reference: ReferenceVerifier | None = None
        if stage.reference_answers is not None:
            ask = reference_guided_prompt(stage.reference_answers, stage.prompt_set)
            self.reference = ReferenceVerifier(stage, seed, critic, ask, store)

    async def __call__(
        self, solution: Solution, parsed: ParsedResponse, votes: Sequence[Verification]
    ) -> None:
        if self.reviser is not None:
            await self.reviser.revise(solution, parsed, votes)
        if self.reference is not None:
            await self.reference.verify(solution, parsed)

    def made_by(self) -> dict[str, object]:
        """Everything but the verifications that the results depend on, by setting; plain JSON."""
        made_by = self.reviser.made_by() if self.reviser is not None else {}
        if self.reference is not None:
            stage = self._config.stage1
            digest = hashlib.sha256(Path(str(stage.reference_answers)).read_bytes()).hexdigest()[
                :12
            ]
            made_by |= {
                "models.critic": self.critic.fingerprint,
                "stage1.reference_answers": digest,
                "the reference prompt": revision_prompts(stage.prompt_set).version,
            }
        return made_by

    def stats(self) -> dict[str, object]:
        """For the statistics of the stage, which say that answer keys were read where they were."""
        stats: dict[str, object] = {}
        if self.reviser is not None:
            stats["revision"] = asdict(self.reviser.counts)
        if self.reference is not None:
            stats["reference_guided"] = {
                **asdict(self.reference.counts),
                "reads_answer_keys": self._config.stage1.reference_answers,
            }
        return stats

    def rates(self) -> list[tuple[str, int, int]]:
        """``(what, failed, all)`` of each kind of text."""
        rows = []
        if self.reviser is not None:
            counts = self.reviser.counts
            rows += [
                ("critiques", counts.failed_critiques, counts.critiques),
                ("merges", counts.failed_merges, counts.merges),
            ]
        if self.reference is not None:
            counts = self.reference.counts
            rows.append(
                (
                    "reference-guided verifications",
                    counts.failed_verifications,
                    counts.verifications,
                )
            )
        return rows


def after_votes(
    config: SparkConfig,
    verifier: ServedModel,
    store: RecordStore,
    log_dir: Path,
) -> AfterVotes | None:
    """None when the configuration asks for nothing beyond votes. ``models.critic`` is loaded only
    when needed.
    """
    if not config.stage1.meta_critique and config.stage1.reference_answers is None:
        return None
    same = config.models.critic is None or config.models.critic == config.models.verifier
    critic = (
        verifier
        if same
        else ServedModel.load(config.engine, config.models.critic, "verifier", log_dir / "critic")
    )
    return AfterVotes(config, critic, store)
