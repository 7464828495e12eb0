"""One SGLang server as an ``Engine``: token ids over HTTP.

Slots, the deadline and what is sent again are ``RemoteEngine``'s; here, time spent paused does not
count against the deadline, each attempt has a request id of its own, and a caller's cancellation
and a missed deadline abort the request on the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import torch

from ..base import EngineFailure, EngineHealth, Generation, GenerationRequest
from ..http.client import ConnectionLost
from .control import ServerControl
from .protocol import PauseMode, generate_json, parse_generate_reply, refuse_aborted

PATH = "/generate"
ABORT_TIMEOUT_S = 2.0
"""How long a cancelled caller waits for its abort to reach the server."""
TOKEN_FIRST_S = 1.0
"""So long a probe waits for its token alone."""


class SglangServer(ServerControl):
    """A client of the server at ``url`` (``http://host:port``), owned by the first event loop that
    uses it.

    ``vocab_size`` is the model's: SGLang pads its embedding and serves ids of the padding, or dies
    of larger ones. ``max_context`` bounds prompt plus new tokens and may not exceed
    ``max_req_input_len`` of ``/server_info`` (the server's context length less 6): beyond, SGLang
    silently samples fewer tokens. ``check_limits`` compares them. ``sampling.seed`` is sent, but
    has an effect only under SGLang's deterministic inference: two sampled runs differ.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        vocab_size: int,
        max_context: int,
        max_in_flight: int,
        request_timeout_s: float,
        control_timeout_s: float,
        token_timeout_s: float = 0.0,
    ) -> None:
        super().__init__(
            url,
            api_key=api_key,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=max_in_flight,
            request_timeout_s=request_timeout_s,
            control_timeout_s=control_timeout_s,
            token_timeout_s=token_timeout_s,
        )
        self._go = asyncio.Event()
        self._go.set()
        self._paused_s, self._paused_at = 0.0, 0.0
        self._sent = self._last_version = 0

    def __repr__(self) -> str:
        return f"SglangServer({self.url})"

    def _clock(self) -> float:
        """Stands still while paused."""
        now = super()._clock()
        return (now if self._go.is_set() else self._paused_at) - self._paused_s

    async def _before_attempt(self) -> None:
        await self._go.wait()

    async def _send(self, request: GenerationRequest, name: str, pooled: bool = True) -> Generation:
        """``name`` is the request id."""
        self._sent += 1
        try:
            reply = await self._http.call(
                "POST", PATH, generate_json(request, name), timeout_s=None, pooled=pooled
            )
        except (asyncio.CancelledError, ConnectionLost):
            await self._abort(name)
            raise
        finally:
            self._sent -= 1
        self._http.refuse_status(PATH, reply)
        with self._naming(PATH):
            generation = parse_generate_reply(reply.content, request)
            refuse_aborted(reply.content)
        return generation

    async def _abort(self, rid: str) -> None:
        """Tell the server to stop; if it cannot be told, the closed connection does, once it looks."""
        with contextlib.suppress(EngineFailure):
            await self._http.call("POST", "/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S)

    async def probe(self, timeout_s: float) -> None:
        """Sample one token, past every queue of this client, or be told by ``/health`` that the
        scheduler has sent something since. Raises ``EngineUnavailable`` when neither comes.

        This tells a hung scheduler from one that is full, also of requests that are not this
        client's (a router's, another run's), behind which the token waits. A paused server cannot
        be probed and is refused as such.
        """
        self._refuse_closed()
        if self.pause_mode is not None:
            raise EngineFailure(f"{self.url}: paused: a probe would wait for the end of the pause")
        tasks = [asyncio.create_task(super().probe(timeout_s))]
        try:
            # What is refused is refused at once, also by a server that is healthy.
            await asyncio.wait(tasks, timeout=min(TOKEN_FIRST_S, timeout_s / 2))
            if not tasks[0].done():
                tasks.append(asyncio.create_task(self._call("GET", "/health", timeout_s=timeout_s)))
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done() or tasks[1].exception() is not None:
                await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def check_limits(self) -> None:
        """Raise ``EngineFailure`` when the server would cut short what ``max_context`` allows."""
        longest = (await self.server_info()).get("max_req_input_len")
        if not isinstance(longest, int):
            raise EngineFailure(f"{self.url}: max_req_input_len is missing from /server_info")
        if self.limits.max_context > longest:
            raise EngineFailure(
                f"{self.url}: max_context={self.limits.max_context} is over the {longest} tokens this server serves in "
                "full (its context length less 6): lower engine.max_context or raise --context-length"
            )

    def in_flight(self) -> int:
        """Requests sent and not answered yet."""
        return self._sent

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Not here: how tensors travel to a server (disk, broadcast, handle) is ``weight_sync``'s
        to choose.
        """
        raise EngineFailure(
            f"{self.url}: a server takes no tensors from its client; use a transport of weight_sync"
        )

    async def pause(self, mode: PauseMode = PauseMode.RETRACT) -> None:
        """Stop sampling; new requests are held here. Running ones go on later from a fresh prefill
        (RETRACT).
        """
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
        """Asks ``/health`` (a server that works on something answers within about a second) and
        ``/model_info``.

        During a pause ``/health`` turns 503, so then only the front process is asked. Never raises:
        a server that does not answer is not alive, and has the version it last told.
        """
        return EngineHealth(
            alive=await self._is_alive(),
            paused=self.pause_mode is not None,
            running=self._sent,
            waiting=self._waiting + max(0, len(self._tasks) - self._sent),
            weight_version=self._last_version,
            tokens_generated=self._tokens_generated,
        )

    async def _ask_health(self) -> None:
        if self.pause_mode is None:
            await self._call("GET", "/health")
        self._last_version = await self.weight_version()
