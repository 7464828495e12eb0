"""The embedded engine: continuous batching in the process and event loop that own it.

Requests wait in a queue. One background task gives them rows as these become free, samples one
token for every row per step and yields to the event loop between steps. It ends when no request is
left.

Determinism: the same requests, submitted in the same order with seeds, give bit-identical results
on the same machine (one thread). An idle engine forgets its cached prompts, so earlier requests
have no effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from spark_nemo.models.spec import ModelSpec

from ..base import Engine, EngineFailure, EngineHealth, Generation, GenerationRequest, RequestLimits
from .batch import Batch, Running
from .checksum import tensor_checksum
from .decoder import Decoder
from .weights import checked, fuse, read_folder, read_spec, served_form, served_tensors

log = logging.getLogger(__name__)

ADMISSION_SHARE = 16
"""While more requests wait than fit, rows are filled once 1/16 of them are free: a prefill of one
prompt would waste its step.
"""


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request and the future its caller awaits."""

    request: GenerationRequest
    future: asyncio.Future[Generation]


class LocalEngine(Engine):
    """A Qwen2 decoder in plain torch, float32, on the CPU.

    ``max_context`` is cut to the model's ``max_position_embeddings``. ``tensors`` are Hugging
    Face-named weights of version ``version``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        max_batch_size: int,
        max_context: int,
        version: int = 0,
    ) -> None:
        self.max_context = min(max_context, spec.max_positions)
        self._limits = RequestLimits(spec.vocab_size, self.max_context)
        self._spec = spec
        self._decoder = Decoder(spec, fuse(spec, checked(spec, tensors)), self.max_context)
        self._batch = Batch(self._decoder, max_batch_size)
        self._version = version
        self._waiting: deque[_Ticket] = deque()
        self._tickets: dict[Running, _Ticket] = {}
        self._not_paused = asyncio.Event()
        self._not_paused.set()
        self._task: asyncio.Task[None] | None = None
        self._abandoned = False
        self._tokens_generated = 0
        self._end: str | None = None

    @classmethod
    def from_folder(
        cls, folder: Path | str, *, max_batch_size: int, max_context: int, version: int = 0
    ) -> LocalEngine:
        """Serve a Hugging Face folder. Raises ``EngineFailure`` for one that is not supported."""
        return cls(
            read_spec(folder),
            read_folder(folder),
            max_batch_size=max_batch_size,
            max_context=max_context,
            version=version,
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``. A cancelled request leaves the batch before the next step."""
        self._require_valid(request)
        ticket = _Ticket(request, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        if self._task is None:
            self._task = asyncio.create_task(self._serve(), name="LocalEngine")
            self._task.add_done_callback(self._served)
        try:
            return await ticket.future
        finally:
            self._abandoned |= ticket.future.cancelled()

    def _require_valid(self, request: GenerationRequest) -> None:
        """Raise ``EngineFailure`` for what cannot be served, before it can hurt the batch."""
        self._require_open()
        self._limits.check(request)

    def _require_open(self) -> None:
        if self._end is not None:
            raise EngineFailure(self._end)

    async def _serve(self) -> None:
        """Seat, step, answer, until nothing is waiting or running."""
        while True:
            await asyncio.sleep(0)  # let callers in and their results out
            await self._not_paused.wait()
            # Never held across an await: the mode belongs to the thread, and other engines (or a
            # trainer) run in it.
            with torch.inference_mode():
                if not self._advance():
                    break
        self._batch.forget_prefixes()
        self._task = None

    def _advance(self) -> bool:
        """One step of the batch; False when nothing is left to run."""
        self._drop_abandoned()
        self._seat_waiting()
        if not self._batch.running:
            return False
        self._tokens_generated += len(self._batch.running)
        for running, generation in self._batch.step():
            ticket = self._tickets.pop(running)
            if not ticket.future.done():
                ticket.future.set_result(generation)
        return True

    def _seat_waiting(self) -> None:
        enough = max(1, self._batch.max_rows // ADMISSION_SHARE)
        if not self._waiting or self._batch.free < min(enough, len(self._waiting)):
            return
        tickets = [
            self._waiting.popleft() for _ in range(min(self._batch.free, len(self._waiting)))
        ]
        added = self._batch.add([ticket.request for ticket in tickets], self._version)
        self._tickets |= zip(added, tickets)

    def _drop_abandoned(self) -> None:
        """Remove the requests whose callers were cancelled."""
        if not self._abandoned:
            return
        self._abandoned = False
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.future.done())
        rows = [
            row
            for row, running in enumerate(self._batch.running)
            if self._tickets[running].future.done()
        ]
        for row in rows:
            del self._tickets[self._batch.running[row]]
        if rows:
            self._batch.remove(rows)

    def _served(self, task: asyncio.Task[None]) -> None:
        """Fail every request if the background task crashed or was cancelled: they would hang."""
        if task.cancelled():
            self._fail_all("the local engine's task was cancelled: its event loop is shutting down")
        elif (error := task.exception()) is not None:
            log.error("the local engine stopped", exc_info=error)
            self._fail_all(f"the local engine stopped: {type(error).__name__}: {error}")

    def _fail_all(self, reason: str) -> None:
        """Fail the requests in flight and every later one."""
        self._end = self._end or reason
        for ticket in [*self._waiting, *self._tickets.values()]:
            if not ticket.future.done():
                ticket.future.set_exception(EngineFailure(self._end))
        self._waiting.clear()
        self._tickets.clear()

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """See ``Engine.update_weights``. All tensors are fused before they replace the old ones.

        Requests in flight keep the keys and values that the old weights computed, as under SGLang's
        ``in_place`` pause. Their later tokens come from new weights on an old cache, which
        ``Generation.weight_versions`` shows.
        """
        self._require_open()
        with torch.inference_mode():
            self._decoder.weights = fuse(self._spec, checked(self._spec, tensors))
        self._version = version
        self._batch.forget_prefixes()
        for running, emitted in zip(self._batch.running, self._batch.emitted()):
            running.versions.append((emitted, version))

    def served_form(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the Hugging Face tensor ``name`` as ``weights_checksum`` hashes it."""
        return served_form(self._spec, name, tensor)

    async def weights_checksum(self) -> list[dict[str, str]]:
        """See ``Engine.weights_checksum``; hashes the fused tensors under Hugging Face names."""
        served = served_tensors(self._spec, self._decoder.weights)
        return [{name: tensor_checksum(tensor) for name, tensor in served}]

    async def pause(self) -> None:
        """See ``Engine.pause``. No step is in progress while a caller runs on the event loop."""
        self._not_paused.clear()

    async def resume(self) -> None:
        """See ``Engine.resume``."""
        self._not_paused.set()

    async def health(self) -> EngineHealth:
        """See ``Engine.health``; ``alive`` is False once closed or crashed."""
        return EngineHealth(
            alive=self._end is None,
            paused=not self._not_paused.is_set(),
            running=len(self._batch.running),
            waiting=len(self._waiting),
            weight_version=self._version,
            tokens_generated=self._tokens_generated,
        )

    async def close(self) -> None:
        """See ``Engine.close``; frees the cache. Idempotent."""
        self._fail_all("the local engine was closed")
        task = self._task
        self._task = None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._batch = Batch(self._decoder, 0)
