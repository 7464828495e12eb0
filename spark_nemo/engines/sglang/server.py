"""One SGLang server as an ``Engine``: token ids over HTTP.

A request gets one of ``max_in_flight`` slots, then its deadline runs; time spent paused does not count. What never
reached the server, lost its connection or met a 503 is sent again here a few times, under a new request id; whatever
fails after that is ``EngineUnavailable``, and a fleet serves it elsewhere. One ``generate`` returns one ``Generation``
or raises, so nothing is counted twice. A caller's cancellation and a missed deadline abort the request on the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine, Iterable

import torch

from ..base import (
    Engine,
    EngineFailure,
    EngineHealth,
    EngineUnavailable,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from .control import BACK_OFF_S, ServerControl
from .http import ConnectionLost, NotReached, Overloaded, ServerHttp
from .protocol import PauseMode, ServerLimits, generate_json, parse_generation, refuse_aborted

log = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 2.0
"""How long a cancelled caller waits for its abort to reach the server."""
_PROBE = GenerationRequest((0,), SamplingParams(max_new_tokens=1, temperature=0.0))


class SglangServer(ServerControl, Engine):
    """A client of the server at ``url`` (``http://host:port``), owned by the first event loop that uses it.

    ``vocab_size`` is the model's: SGLang pads its embedding and serves ids of the padding, or dies of larger ones.
    ``max_context`` bounds prompt plus new tokens and may not exceed ``max_req_input_len`` of ``/server_info`` (the
    server's context length less 6): beyond, SGLang silently samples fewer tokens. ``check_limits`` compares them.
    """

    def __init__(self, url: str, *, api_key: str | None, vocab_size: int, max_context: int, max_in_flight: int,
                 request_timeout_s: float, control_timeout_s: float) -> None:
        for field, value in (("max_in_flight", max_in_flight), ("request_timeout_s", request_timeout_s),
                             ("control_timeout_s", control_timeout_s)):
            if value <= 0:
                raise ValueError(f"{field}={value}: must be positive")
        super().__init__(ServerHttp(url, api_key, max_in_flight), control_timeout_s)
        self.limits = ServerLimits(vocab_size, max_context)
        self._request_timeout_s = request_timeout_s
        self._slots = asyncio.Semaphore(max_in_flight)
        self._go = asyncio.Event()
        self._go.set()
        self._tasks: set[asyncio.Task[Generation]] = set()
        self._waiting = self._sent = 0
        self._paused_s, self._paused_at = 0.0, 0.0
        self._tokens_generated = 0
        self._last_version = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"SglangServer({self.url})"

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``. ``sampling.seed`` is sent, but has an effect only under SGLang's deterministic
        inference: two sampled runs differ. Raises ``EngineUnavailable`` when another server could serve it.
        """
        self._refuse_closed()
        self.limits.refuse_bad(request)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            self._refuse_closed()
            generation = await self._within_deadline(self._send_until_served(request))
        finally:
            self._slots.release()
        self._tokens_generated += len(generation.token_ids)
        return generation

    async def _within_deadline(self, work: Coroutine[None, None, Generation]) -> Generation:
        """Run ``work``; when it is late or the caller is cancelled, cancel it and wait until it has told the server."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        end = self._serving_clock() + self._request_timeout_s
        try:
            while not task.done() and (left := end - self._serving_clock()) > 0:
                await asyncio.wait([task], timeout=max(left, 0.01))
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            self._tasks.discard(task)
        if task.cancelled():
            self._refuse_closed()
            raise EngineUnavailable(f"{self.url}: no generation within {self._request_timeout_s:g} s")
        return task.result()

    def _serving_clock(self) -> float:
        """Seconds that stand still while paused."""
        now = asyncio.get_running_loop().time()
        return (now if self._go.is_set() else self._paused_at) - self._paused_s

    async def _send_until_served(self, request: GenerationRequest) -> Generation:
        name = uuid.uuid4().hex
        for attempt, wait in enumerate((*BACK_OFF_S, None)):
            await self._go.wait()
            try:
                return await self._send(request, f"{name}-{attempt}")
            except (NotReached, ConnectionLost, Overloaded) as error:
                if wait is None:
                    raise
                log.debug("%s; trying again in %g s", error, wait)
                await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _send(self, request: GenerationRequest, rid: str, pooled: bool = True) -> Generation:
        path = "/generate"
        self._sent += 1
        try:
            reply = await self._http.call("POST", path, generate_json(request, rid), timeout_s=None, pooled=pooled)
        except (asyncio.CancelledError, ConnectionLost):
            await self._abort(rid)
            raise
        finally:
            self._sent -= 1
        self._http.refuse_status(path, reply)
        try:
            generation = parse_generation(reply.content, request)
            refuse_aborted(reply.content)
        except EngineUnavailable as error:
            raise EngineUnavailable(f"{self.url}{path}: {error}") from error
        except EngineFailure as error:
            raise EngineFailure(f"{self.url}{path}: {error}") from error
        return generation

    async def _abort(self, rid: str) -> None:
        """Tell the server to stop; if it cannot be told, the closed connection does, once it looks."""
        with contextlib.suppress(EngineFailure):
            await self._http.call("POST", "/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S)

    async def probe(self, timeout_s: float) -> None:
        """Sample one token, past every queue of this client. Raises ``EngineUnavailable`` when it does not come.

        This tells a hung scheduler from a busy one; a paused server cannot be probed and is refused as such.
        """
        self._refuse_closed()
        if self.pause_mode is not None:
            raise EngineFailure(f"{self.url}: paused: a probe would wait for the end of the pause")
        rid = f"probe-{uuid.uuid4().hex}"
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(_PROBE, rid, pooled=False)
        except TimeoutError as error:
            raise EngineUnavailable(f"{self.url}: the probe's token did not come within {timeout_s:g} s") from error

    async def check_limits(self) -> None:
        """Raise ``EngineFailure`` when the server would cut short what ``max_context`` allows."""
        longest = (await self.server_info()).get("max_req_input_len")
        if not isinstance(longest, int):
            raise EngineFailure(f"{self.url}: max_req_input_len is missing from /server_info")
        if self.limits.max_context > longest:
            raise EngineFailure(
                f"{self.url}: max_context={self.limits.max_context} is over the {longest} tokens this server serves in "
                "full (its context length less 6): lower engine.max_context or raise --context-length")

    def in_flight(self) -> int:
        """Requests sent and not answered yet."""
        return self._sent

    async def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Not here: how tensors travel to a server (disk, broadcast, handle) is ``weight_sync``'s to choose."""
        raise EngineFailure(f"{self.url}: a server takes no tensors from its client; use a transport of weight_sync")

    async def pause(self, mode: PauseMode = PauseMode.RETRACT) -> None:
        """Stop sampling; new requests are held here. Running ones go on later from a fresh prefill (RETRACT)."""
        self._refuse_closed()
        was_paused = not self._go.is_set()
        if not was_paused:
            self._paused_at = asyncio.get_running_loop().time()
            self._go.clear()
        try:
            await self._pause(mode)
        except BaseException:
            if not was_paused:
                self._let_go()
            raise

    async def resume(self) -> None:
        """Go on sampling and send what was held."""
        self._refuse_closed()
        await self._continue()
        self._let_go()

    def _let_go(self) -> None:
        if not self._go.is_set():
            self._paused_s += asyncio.get_running_loop().time() - self._paused_at
            self._go.set()

    async def health(self) -> EngineHealth:
        """Asks ``/health`` (a server that works on something answers within about a second) and ``/model_info``.

        During a pause ``/health`` turns 503, so then only the front process is asked. Never raises: a server that
        does not answer is not alive, and has the version it last told.
        """
        alive = not self._closed
        if alive:
            try:
                if self.pause_mode is None:
                    await self._call("GET", "/health")
                self._last_version = await self.weight_version()
            except EngineFailure as failure:
                log.info("%s is not healthy: %s", self.url, failure)
                alive = False
        return EngineHealth(
            alive=alive, paused=self.pause_mode is not None, running=self._sent,
            waiting=self._waiting + max(0, len(self._tasks) - self._sent),
            weight_version=self._last_version, tokens_generated=self._tokens_generated)

    async def close(self) -> None:
        """Idempotent. Aborts what is in flight and closes the connections; the server lives on."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._http.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EngineUnavailable(f"{self.url}: this client was closed")
