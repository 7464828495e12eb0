"""The one interface every engine has: embedded here, SGLang and vLLM over HTTP later.

Token ids go in and come out; an engine never sees text. Log-probabilities are those of the
distribution the token was drawn from *after* temperature and before top-p/top-k cutting (SGLang's
meaning), so trainer and engine can be compared.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch


class FinishReason(StrEnum):
    """Why an engine stopped. ``ABORT`` comes with the tokens sampled so far."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class EngineFailure(RuntimeError):
    """A request the engine could not serve (bad ids, too long, engine closed). Callers turn it into
    EngineError.
    """


class EngineUnavailable(EngineFailure):
    """This engine cannot serve just now (died, hung, unreachable, shut down), but another one
    could: safe to redo.
    """


class EngineLost(EngineFailure):
    """Nothing is left that could serve any request: a run must stop on it and not count it as one
    failed request.
    """


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. ``temperature=0`` is greedy; ``top_p=1`` and ``top_k=0`` switch those
    cuts off.

    ``seed`` makes a request's draws independent of what else is in the batch; None draws fresh
    randomness.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or positive")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Generation:
    """What was sampled. The terminating stop token, when there is one, is the last of
    ``token_ids``.

    ``logprobs`` are in nats; ``weight_versions`` holds the version of the weights that sampled each
    token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """A snapshot: is it alive, is it paused, what is in flight, and which weights does it serve."""

    alive: bool
    paused: bool
    running: int
    waiting: int
    weight_version: int
    tokens_generated: int


class Engine(abc.ABC):
    """A served causal language model. One event loop owns an engine; ``generate`` may be awaited
    many times at once.
    """

    max_in_flight: int | None = None
    """So many requests are sent at once, the others wait in ``generate``; None when there is no
    such bound.
    """

    @abc.abstractmethod
    async def generate(self, request: GenerationRequest) -> Generation:
        """Continue one prompt. Raises ``EngineFailure`` when it cannot be served."""

    @abc.abstractmethod
    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Replace the weights by Hugging Face-named tensors and drop cached prefixes.

        Requests in flight go on under the new weights; every token carries the version that sampled
        it. Raises ``EngineFailure`` if a tensor is missing, unknown or of another shape; then no
        weight has changed.
        """

    async def weights_checksum(self) -> list[dict[str, str]]:
        """A hash of every tensor as it is served now, by the engine's name of it; one dictionary
        per engine rank.

        Raises ``EngineFailure`` when the engine cannot tell. See ``weight_sync.checksum`` for what
        is compared with it.
        """
        raise EngineFailure(f"{type(self).__name__} gives no checksums of its weights")

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop decoding; requests in flight keep their place."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Go on decoding."""

    @abc.abstractmethod
    async def health(self) -> EngineHealth:
        """Report state without waiting for a generation."""

    async def probe(self, timeout_s: float) -> None:
        """Raise ``EngineUnavailable`` unless the engine could serve a request now, as far as it can
        tell within ``timeout_s``. Overridden where a real generation is a better answer than
        ``health``; not asked while paused.
        """
        if not (await self.health()).alive:
            raise EngineUnavailable("the engine reports that it is not alive")

    @abc.abstractmethod
    async def close(self) -> None:
        """Release everything; requests in flight end with ``EngineFailure``."""
