"""A model for the stages: an engine, its tokenizer and the fingerprint of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import EngineConfig, SamplingConfig
from spark_nemo.records.fingerprint import model_fingerprint

from .base import Engine, Generation, GenerationRequest, SamplingParams
from .factory import build_engine
from .tokenizer import Tokenizer

GRAMMAR_TEXTS = (
    "<think>",
    "</think>",
    "<step>",
    "</step>",
    "<answer>\\boxed{",
    "}</answer>",
    "## Step 1:",
    "**",
    "\n",
)
"""Texts of which every format of the grammar is made.

A tokenizer that cannot encode one of them would make every reply a parse failure.
"""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of a chat model: its tokens, and its text without the closing stop token."""

    prompt_ids: tuple[int, ...]
    generation: Generation
    text: str


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An engine with the tokenizer of the model it serves."""

    engine: Engine
    tokenizer: Tokenizer
    fingerprint: str
    """Fingerprint of the model folder that was loaded; weight updates do not change it."""

    @classmethod
    def load(
        cls, config: EngineConfig, folder: str | Path, role: str, log_dir: Path | None = None
    ) -> ServedModel:
        """Serve the model in ``folder`` on the engines of ``role`` (``policy`` or ``verifier``).

        Servers that are launched for it write to ``log_dir``. Raises ``ConfigError`` or
        ``TokenizerError`` when the folder is not a model or the role has no engines.
        """
        fingerprint = model_fingerprint(folder)
        tokenizer = Tokenizer.load(folder)
        tokenizer.require_tokens(GRAMMAR_TEXTS)
        return cls(build_engine(config, folder, role, log_dir), tokenizer, fingerprint)

    async def complete(
        self, messages: Sequence[dict[str, str]], sampling: SamplingConfig, seed: int | None
    ) -> Completion:
        """Continue a chat. Raises ``EngineFailure`` when the engine cannot serve it."""
        return await self.complete_prompt(
            self.tokenizer.encode_chat(list(messages)), sampling, seed
        )

    async def complete_prompt(
        self, prompt_ids: tuple[int, ...], sampling: SamplingConfig, seed: int | None
    ) -> Completion:
        """Continue an encoded chat: many samples of one prompt encode it once."""
        params = SamplingParams(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            stop_token_ids=tuple(self.tokenizer.eos_ids),
            seed=seed,
        )
        generation = await self.engine.generate(GenerationRequest(prompt_ids, params))
        return Completion(
            prompt_ids, generation, self.tokenizer.decode_response(generation.token_ids)
        )
