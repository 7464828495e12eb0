"""One SGLang server as an ``Engine``: token ids over HTTP.

Requests are held here while this client has paused the server. A caller's cancellation and a missed
deadline abort the request on the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import torch

from ..base import EngineFailure, EngineHealth, Generation, GenerationRequest
from ..http.client import ConnectionLost, TimedOut
from .control import ServerControl
from .protocol import PauseMode, generate_json, parse_generate_reply, require_finished

PATH = "/generate"
ABORT_TIMEOUT_S = 2.0
"""Time that a cancelled caller waits for its abort to reach the server."""
TOKEN_FIRST_S = 1.0
"""Time that a probe waits for its token before it also calls ``/health``."""


class SglangServer(ServerControl):
    """A client of the SGLang server at ``url``; see ``RemoteEngine``.

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
        request_timeout_s: float | None,
        control_timeout_s: float,
    ) -> None:
        super().__init__(
            url,
            api_key=api_key,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=max_in_flight,
            request_timeout_s=request_timeout_s,
            control_timeout_s=control_timeout_s,
        )
        self._not_paused = asyncio.Event()
        self._not_paused.set()
        self._sent = 0
        self._last_version = 0

    def __repr__(self) -> str:
        return f"SglangServer({self.url})"

    async def _send(
        self, request: GenerationRequest, request_id: str, pooled: bool = True
    ) -> Generation:
        # A request that reaches a paused server cannot be aborted until the pause ends.
        await self._not_paused.wait()
        self._sent += 1
        try:
            reply = await self._http.call(
                "POST",
                PATH,
                generate_json(request, request_id),
                timeout_s=self._request_timeout_s,
                pooled=pooled,
            )
        except (asyncio.CancelledError, ConnectionLost, TimedOut):
            await self._abort(request_id)
            raise
        finally:
            self._sent -= 1
        self._http.require_ok(PATH, reply)
        with self._naming(PATH):
            generation = parse_generate_reply(reply.content, request)
            require_finished(reply.content)
        return generation

    async def _abort(self, request_id: str) -> None:
        """Tell the server to stop; failing that, it notices the closed connection at some point."""
        with contextlib.suppress(EngineFailure):
            await self._http.call(
                "POST", "/abort_request", {"rid": request_id}, timeout_s=ABORT_TIMEOUT_S
            )

    async def probe(self, timeout_s: float) -> None:
        """Sample one token, or learn from ``/health`` that the scheduler has sent one since.

        This tells a hung scheduler from a full one, also when the requests before the token are
        another client's. Raises ``EngineUnavailable`` when neither answer comes, and
        ``EngineFailure`` when this client has paused the server, which then answers no probe.
        """
        self._require_open()
        if self.pause_mode is not None:
            raise EngineFailure(f"{self.url}: paused: a probe would wait for the end of the pause")
        token = asyncio.create_task(super().probe(timeout_s))
        tasks = [token]
        try:
            # The token first: a server that rejects requests (wrong key) may still be healthy.
            await asyncio.wait(tasks, timeout=min(TOKEN_FIRST_S, timeout_s / 2))
            if not token.done():
                health = asyncio.create_task(self._call("GET", "/health", timeout_s=timeout_s))
                tasks.append(health)
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if not token.done() and health.exception() is None:
                    return
            await token
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
                f"{self.url}: max_context={self.limits.max_context} is over the {longest} tokens "
                "that this server serves in full (its context length less 6): lower "
                "engine.max_context or raise --context-length"
            )

    def in_flight(self) -> int:
        """Return the number of requests that were sent and not answered yet."""
        return self._sent

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Raise ``EngineFailure``: tensors travel by a transport of ``weight_sync``."""
        raise EngineFailure(
            f"{self.url}: a server takes no tensors from its client; use a transport of weight_sync"
        )

    async def pause(self, mode: PauseMode = PauseMode.RETRACT) -> None:
        """Stop sampling and hold new requests here.

        Under RETRACT the running requests later go on from a fresh prefill.
        """
        self._require_open()
        was_paused = not self._not_paused.is_set()
        self._not_paused.clear()
        try:
            await self._pause(mode)
        except BaseException:
            if not was_paused:
                self._not_paused.set()
            raise

    async def resume(self) -> None:
        """Go on sampling and send the requests that were held."""
        self._require_open()
        await self._continue()
        self._not_paused.set()

    async def health(self) -> EngineHealth:
        """See ``Engine.health``. Never raises: a server that does not answer is not alive.

        The version of a server that does not answer is the one it last reported.
        """
        return EngineHealth(
            alive=await self._is_alive(),
            paused=self.pause_mode is not None,
            running=self._sent,
            waiting=max(0, len(self._tasks) - self._sent),
            weight_version=self._last_version,
            tokens_generated=self._tokens_generated,
        )

    async def _check_alive(self) -> None:
        # /health is 503 during a pause. Otherwise a busy server answers it within about a second.
        if self.pause_mode is None:
            await self._call("GET", "/health")
        self._last_version = await self.weight_version()
