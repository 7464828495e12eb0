"""A model as the stages see it: an engine, its tokenizer and a fingerprint that changes when its
files change.
"""

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
"""What every format of the grammar is written with; a tokenizer that cannot say it would make every
reply a failure.
"""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of a chat model: its text without the closing stop token, and the tokens behind
    it.
    """

    prompt_ids: tuple[int, ...]
    generation: Generation
    text: str


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An engine with the tokenizer of the model it serves. ``fingerprint`` is that of the weights it
    was loaded with.
    """

    engine: Engine
    tokenizer: Tokenizer
    fingerprint: str

    @classmethod
    def load(
        cls, config: EngineConfig, folder: str | Path, role: str, log_dir: Path | None = None
    ) -> ServedModel:
        """Serve the model in ``folder`` on the engines of ``role`` (``policy`` or ``verifier``).

        Servers that are launched for it write to ``log_dir``. Raises ``ConfigError`` or
        ``TokenizerError`` when the folder is no model or the role has no engines.
        """
        fingerprint, tokenizer = model_fingerprint(folder), Tokenizer.load(folder)
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
        """``complete`` for a chat encoded before: of many samples of one prompt, only the first
        needs to encode it.
        """
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
