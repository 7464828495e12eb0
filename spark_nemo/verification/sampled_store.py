"""Records of stage I under keys made of everything that determines them: look up, else sample.

A run that was killed, or grown to more votes, therefore samples only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from spark_nemo.config import SamplingConfig
from spark_nemo.engines.base import EngineFailure, EngineLost, FinishReason
from spark_nemo.engines.served_model import Completion, ServedModel
from spark_nemo.grammar import ChatMessages
from spark_nemo.records import derive_seed
from spark_nemo.records.store import RecordStore


class StoredRecord(Protocol):
    """A record that one request to a model makes."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, object]: ...

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Self: ...


Record = TypeVar("Record", bound=StoredRecord)


@dataclass(frozen=True, slots=True)
class Reused(Generic[Record]):
    """A record that was in the store."""

    record: Record


@dataclass(frozen=True, slots=True)
class Sampled(Generic[Record]):
    """A record that was requested now, and what the request cost."""

    record: Record
    num_prompt_tokens: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that the engine did not serve. Nothing is stored, so the next run retries it."""

    failure: EngineFailure
    seconds: float


class SampledStore:
    """The record store of one shard, for records that a model samples."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    def get(self, record_type: type[Record], key: str) -> Record | None:
        """The stored record of this key, or None."""
        stored = self._store.get(key, record_type.kind)
        return None if stored is None else record_type.from_json(stored)

    async def get_or_sample(
        self,
        record_type: type[Record],
        key: str,
        *,
        model: ServedModel,
        prompt: ChatMessages | tuple[int, ...],
        sampling: SamplingConfig,
        make_record: Callable[[Completion], Record],
        parent: str | None = None,
    ) -> Reused[Record] | Sampled[Record] | Failed:
        """Return the stored record of ``key``, or request, store and return it.

        ``prompt`` is a chat or an encoded chat. The request's seed follows from the key. ``parent``
        is the key of the record that this one is about. Raises ``EngineLost`` if no engine is left.
        """
        stored = self.get(record_type, key)
        if stored is not None:
            return Reused(stored)
        started = time.monotonic()
        try:
            completion = await _complete(model, prompt, sampling, derive_seed(key))
        except EngineLost:
            # Every later request would fail too.
            raise
        except EngineFailure as failure:
            return Failed(failure, time.monotonic() - started)
        return Sampled(
            record=self.add(key, make_record(completion), parent),
            num_prompt_tokens=len(completion.prompt_ids),
            num_tokens=len(completion.generation.token_ids),
            seconds=time.monotonic() - started,
        )

    def add(self, key: str, record: Record, parent: str | None = None) -> Record:
        """Store a record and return the one that counts for ``key``.

        Problems with the same question share their keys. If two of them sample at the same time on
        an engine that ignores seeds, their texts differ. Continuing with a text that was not stored
        would file its votes under the stored solution, so the caller must use what is returned.
        """
        payload = record.to_json()
        if self._store.append(key, record.kind, payload, parent=parent):
            return record
        stored = self.get(type(record), key)
        if stored is None:
            # The stored line is damaged; reading it removed it from the index.
            self._store.append(key, record.kind, payload, parent=parent)
            return record
        return stored


async def _complete(
    model: ServedModel,
    prompt: ChatMessages | tuple[int, ...],
    sampling: SamplingConfig,
    seed: int,
) -> Completion:
    if isinstance(prompt, tuple):
        completion = await model.complete_prompt(prompt, sampling, seed)
    else:
        completion = await model.complete(prompt, sampling, seed)
    generation = completion.generation
    if generation.finish_reason is FinishReason.ABORT:
        # Part of a text is not a sample.
        raise EngineFailure(f"aborted after {len(generation.token_ids)} tokens")
    return completion
