"""One server as an ``Engine``: sending a request once, the probe, control calls, and close.

Queueing, deadlines on the fleet's clock, and retries belong to the fleet. A client used without a
fleet is still bounded, by its ``max_in_flight`` connections, and timed, by ``request_timeout_s``.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator
from typing import Any

from ..base import (
    Engine,
    EngineFailure,
    EngineUnavailable,
    Generation,
    GenerationRequest,
    RequestLimits,
    SamplingParams,
)
from .client import ServerHttp

log = logging.getLogger(__name__)

PROBE = GenerationRequest((0,), SamplingParams(max_new_tokens=1, temperature=0.0))


class RemoteEngine(Engine):
    """A client of the server at ``url`` (``http://host:port``).

    The first event loop that uses it owns it. ``request_timeout_s`` is the wall-clock deadline of
    one request; None leaves the deadline to the caller, as a fleet wants it, whose clock knows of
    pauses. A subclass implements ``_send`` and ``_check_alive``.
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
        for field, value in (
            ("max_in_flight", max_in_flight),
            ("request_timeout_s", request_timeout_s),
            ("control_timeout_s", control_timeout_s),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{field}={value}: must be positive")
        self.limits = RequestLimits(vocab_size, max_context)
        self.max_in_flight = max_in_flight
        self._http = ServerHttp(url, api_key, max_in_flight)
        self._request_timeout_s = request_timeout_s
        self._control_timeout_s = control_timeout_s
        self._tasks: set[asyncio.Task[Generation]] = set()
        self._tokens_generated = 0
        self._closed = False

    @property
    def url(self) -> str:
        """Base URL of the server; also its name in messages."""
        return self._http.url

    @abc.abstractmethod
    async def _send(
        self, request: GenerationRequest, request_id: str, pooled: bool = True
    ) -> Generation:
        """Send ``request`` once and read the answer; not ``pooled``: on a connection of its own.

        When the call is cancelled or late, the server must end the request. Raises what
        ``ServerHttp.call`` raises, and ``EngineFailure``.
        """

    @abc.abstractmethod
    async def _check_alive(self) -> None:
        """Raise ``EngineFailure`` unless the server answers."""

    def _check_request(self, request: GenerationRequest) -> None:
        """Raise ``EngineFailure`` for a request that must not be sent."""
        self.limits.check(request)

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``."""
        self._require_open()
        self._check_request(request)
        # A task of its own, so that close() can end it. Cancelling the caller cancels the task,
        # and the caller then waits until the task has told the server.
        task = asyncio.create_task(self._send(request, uuid.uuid4().hex))
        self._tasks.add(task)
        try:
            generation = await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is None or not caller.cancelling():
                self._require_open()  # close() cancelled the task, not the caller
            raise
        finally:
            self._tasks.discard(task)
        self._tokens_generated += len(generation.token_ids)
        return generation

    async def probe(self, timeout_s: float) -> None:
        """Sample one token, past every queue of this client.

        Raises ``EngineUnavailable`` when the token does not come in time.
        """
        self._require_open()
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(PROBE, f"probe-{uuid.uuid4().hex}", pooled=False)
        except TimeoutError as error:
            raise EngineUnavailable(
                f"{self.url}: the probe's token did not come within {timeout_s:g} s"
            ) from error

    async def _is_alive(self) -> bool:
        """Return False for a server that does not answer; never raises."""
        if self._closed:
            return False
        try:
            await self._check_alive()
        except EngineFailure as failure:
            log.info("%s is not healthy: %s", self.url, failure)
            return False
        return True

    async def close(self) -> None:
        """End the requests in flight, here and on the server, and close the connections.

        The server lives on. Idempotent.
        """
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)  # their aborts still need the connections
        await self._http.close()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineUnavailable(f"{self.url}: this client was closed")

    async def _call(
        self, method: str, path: str, body: object = None, timeout_s: float | None = None
    ) -> Any:
        """Return the content of a 200 reply; ``timeout_s`` defaults to that of a control call.

        Raises ``EngineFailure`` on any other reply.
        """
        reply = await self._http.call(
            method, path, body, timeout_s=timeout_s or self._control_timeout_s
        )
        self._http.require_ok(path, reply)
        return reply.content

    @contextlib.contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        """Add server and path to the message of a failure to read a reply."""
        try:
            yield
        except EngineUnavailable as error:
            raise EngineUnavailable(f"{self.url}{path}: {error}") from error
        except EngineFailure as error:
            raise EngineFailure(f"{self.url}{path}: {error}") from error
