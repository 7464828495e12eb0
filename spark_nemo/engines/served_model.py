"""A model as the stages see it: an engine, its tokenizer and an fingerprint that changes when its
files change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.config import ConfigError, EngineConfig, SamplingConfig

from .base import Engine, Generation, GenerationRequest, SamplingParams
from .factory import build_engine
from .tokenizer import Tokenizer

_SAMPLED_BYTES = 1 << 20
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


def model_fingerprint(folder: str | Path) -> str:
    """12 hex digits from config, tokenizer, chat template, end-of-sequence ids and weights; of each
    file the size, the first and the last MiB.

    Reading a 140 GB checkpoint to the end only to name it would cost minutes at every start; two
    checkpoints of one training run differ in every block, so the ends tell them apart.
    """
    folder = Path(folder)
    names = (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    files = [folder / name for name in names] + sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        if not path.exists():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"model folder {folder}: no config.json there; name a Hugging Face model folder (hub names "
            "are not downloaded: hf download NAME --local-dir FOLDER)"
        )
    return digest.hexdigest()[:12]
