"""What an engine may be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .base import EngineFailure, GenerationRequest


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What can be served without harm. Ids outside the vocabulary would hurt a whole batch, and
    kill SGLang or, worse, are served by it.
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

    def refuse_bad(self, request: GenerationRequest) -> None:
        """Raise ``EngineFailure`` for what the server would refuse, cut short or die of."""
        ids, room = request.prompt_ids, request.sampling.max_new_tokens
        if not ids:
            raise EngineFailure("the prompt is empty: give at least one token id")
        if len(ids) + room > self.max_context:
            raise EngineFailure(
                f"prompt of {len(ids)} tokens + max_new_tokens={room} is {len(ids) + room}, over the context of "
                f"{self.max_context}: shorten one or raise engine.max_context"
            )
        for field, tokens in (("prompt", ids), ("stop", request.sampling.stop_token_ids)):
            bad = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if bad is not None:
                raise EngineFailure(
                    f"{field} token id {bad} is outside the vocabulary of {self.vocab_size}"
                )
