"""The interface of every engine: embedded, an SGLang or vLLM server, or a fleet of servers.

Token ids go in and come out; an engine never sees text. A log-probability is that of the
distribution the token was drawn from, after temperature and before top-p and top-k. This is
SGLang's meaning, so that log-probabilities of trainer and engine can be compared.
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
    """A request that the engine failed to serve: invalid ids, too long, or the engine was closed.

    Callers record it as an ``EngineError``, never as a score.
    """


class EngineUnavailable(EngineFailure):
    """A failure of this engine, not of the request: another engine could serve it."""


class EngineLost(EngineFailure):
    """No engine is left: a run must stop on it and not count it as one failed request."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of drawing tokens.

    ``temperature=0`` is greedy; ``top_p=1`` and ``top_k=0`` switch those cuts off. A ``seed`` makes
    a request's draws independent of what else is in the batch; None draws fresh randomness.
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
    """The sampled tokens. A stop token that ended the generation is the last of ``token_ids``."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats."""
    weight_versions: tuple[int, ...]
    """Version of the weights that sampled each token."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """A snapshot of an engine's state."""

    alive: bool
    paused: bool
    running: int
    waiting: int
    weight_version: int
    tokens_generated: int


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds of the requests that an engine can serve without harm.

    Ids outside the vocabulary would spoil a whole batch. SGLang dies of them or, if they are in the
    padding of its embedding, serves them.
    """

    vocab_size: int
    max_context: int

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 1")
        if self.max_context < 2:
            raise ValueError(
                f"max_context={self.max_context}: must hold a prompt token and a new one"
            )

    def check(self, request: GenerationRequest) -> None:
        """Raise ``EngineFailure`` for a request that a server would reject, cut short or die of."""
        prompt = request.prompt_ids
        new_tokens = request.sampling.max_new_tokens
        if not prompt:
            raise EngineFailure("the prompt is empty: give at least one token id")
        if len(prompt) + new_tokens > self.max_context:
            raise EngineFailure(
                f"prompt of {len(prompt)} tokens + max_new_tokens={new_tokens} is "
                f"{len(prompt) + new_tokens}, over the context of {self.max_context}: shorten one "
                "or raise engine.max_context"
            )
        self._check_ids("prompt", prompt)
        self._check_ids("stop", request.sampling.stop_token_ids)

    def _check_ids(self, what: str, token_ids: tuple[int, ...]) -> None:
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise EngineFailure(
                    f"{what} token id {token} is outside the vocabulary of {self.vocab_size}"
                )


class Engine(abc.ABC):
    """A served causal language model.

    One event loop owns an engine; ``generate`` may be awaited many times at once.
    """

    max_in_flight: int | None = None
    """Maximum concurrent requests; a fleet queues further ones. None means unbounded."""

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
        """Return a hash of every served tensor by its name in the engine, per engine rank.

        Raises ``EngineFailure`` when the engine cannot tell. ``weight_sync.checksum`` has what is
        compared with it.
        """
        raise EngineFailure(f"{type(self).__name__} does not report checksums of its weights")

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
        """Raise ``EngineUnavailable`` unless the engine could serve a request now.

        Overridden where a real generation is a better answer than ``health``. Not called while
        paused.
        """
        if not (await self.health()).alive:
            raise EngineUnavailable("the engine reports that it is not alive")

    @abc.abstractmethod
    async def close(self) -> None:
        """Release everything; requests in flight end with ``EngineFailure``."""
