"""An engine without a model, whose replies a test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from spark_nemo.engines.base import (
    Engine,
    EngineHealth,
    FinishReason,
    Generation,
    GenerationRequest,
)

END = 256


class Bytes:
    """Tokenizer with one token per byte."""

    eos_ids = (END,)

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return tuple(messages[0]["content"].encode())

    def decode_response(self, ids: tuple[int, ...]) -> str:
        return bytes(token for token in ids if token != END).decode()


class Scripted(Engine):
    """Reply with ``script(prompt, number of its calls)``; raise an exception it returns."""

    def __init__(self, script: Callable[[str, int], str | Exception]) -> None:
        self.script, self.seen, self.seeds, self.alive, self.closed = script, {}, [], True, False
        self.running = self.most = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        prompt = bytes(request.prompt_ids).decode()
        count = self.seen[prompt] = self.seen.get(prompt, -1) + 1
        self.seeds.append(request.sampling.seed)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        said = self.script(prompt, count)
        if isinstance(said, Exception):
            raise said
        cut = said.endswith("...")
        ids = tuple(said.encode()) if cut else (*said.encode(), END)
        return Generation(
            ids,
            (0.0,) * len(ids),
            (0,) * len(ids),
            FinishReason.LENGTH if cut else FinishReason.STOP,
        )

    async def update_weights(self, tensors, version) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...

    async def close(self) -> None:
        self.closed = True

    async def health(self) -> EngineHealth:
        return EngineHealth(self.alive, False, 0, 0, 0, 0)
