"""One server as an ``Engine``, whatever it speaks: slots, deadline, retries, probe and close.

A request gets one of ``max_in_flight`` slots, then its deadline runs. What never reached the
server, lost its connection or met a 503 is sent again here a few times, each attempt under a name
of its own; whatever fails after that is ``EngineUnavailable``, and a fleet serves it elsewhere. One
``generate`` returns one ``Generation`` or raises, so nothing is counted twice.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine, Iterator
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
from .client import ConnectionLost, NotReached, Overloaded, ServerHttp

log = logging.getLogger(__name__)

BACK_OFF_S = (0.1, 0.5)
"""Waits before the second and the third attempt of what is safe to repeat."""
PROBE = GenerationRequest((0,), SamplingParams(max_new_tokens=1, temperature=0.0))


class RemoteEngine(Engine):
    """A client of the server at ``url`` (``http://host:port``), owned by the first event loop that
    uses it.

    A subclass says how one request is sent (``_send``) and how health is asked for
    (``_ask_health``); it may refuse more (``_refuse_bad``), hold requests back
    (``_before_attempt``) and stop their clock (``_clock``).
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
        for field, value in (
            ("max_in_flight", max_in_flight),
            ("request_timeout_s", request_timeout_s),
            ("control_timeout_s", control_timeout_s),
        ):
            if value <= 0:
                raise ValueError(f"{field}={value}: must be positive")
        self.limits = RequestLimits(vocab_size, max_context)
        self._http = ServerHttp(url, api_key, max_in_flight)
        self._request_timeout_s, self._control_timeout_s = request_timeout_s, control_timeout_s
        self._token_timeout_s, self.max_in_flight = token_timeout_s, max_in_flight
        self._slots = asyncio.Semaphore(max_in_flight)
        self._tasks: set[asyncio.Task[Generation]] = set()
        self._waiting = self._tokens_generated = 0
        self._closed = False

    @property
    def url(self) -> str:
        """The server's base URL; also its name in messages."""
        return self._http.url

    @abc.abstractmethod
    async def _send(self, request: GenerationRequest, name: str, pooled: bool = True) -> Generation:
        """Send ``request`` once, as ``name``, and read the answer; not ``pooled``, on a connection
        of its own. Has no deadline; when it is cancelled the server must end the request. Raises
        what ``ServerHttp.call`` raises, and ``EngineFailure``.
        """

    @abc.abstractmethod
    async def _ask_health(self) -> None:
        """Raise ``EngineFailure`` unless the server answers."""

    def _refuse_bad(self, request: GenerationRequest) -> None:
        """Raise ``EngineFailure`` for what must not be sent."""
        self.limits.check(request)

    async def _before_attempt(self) -> None:
        """Returns once a request may be sent; within its deadline, by ``_clock``."""

    def _clock(self) -> float:
        """Seconds that count against a deadline."""
        return asyncio.get_running_loop().time()

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``. Raises ``EngineUnavailable`` when another server could serve it."""
        self._refuse_closed()
        self._refuse_bad(request)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            self._refuse_closed()
            generation = await self._within_deadline(
                self._send_until_served(request),
                self._request_timeout_s + self._token_timeout_s * request.sampling.max_new_tokens,
            )
        finally:
            self._slots.release()
        self._tokens_generated += len(generation.token_ids)
        return generation

    async def _within_deadline(
        self, work: Coroutine[None, None, Generation], seconds: float
    ) -> Generation:
        """Run ``work`` in a task of its own, so that ``close`` can end it; when it is late or the
        caller is cancelled, cancel it and wait until it has told the server.
        """
        task = asyncio.create_task(work)
        self._tasks.add(task)
        end = self._clock() + seconds
        try:
            while not task.done() and (left := end - self._clock()) > 0:
                await asyncio.wait([task], timeout=max(left, 0.01))
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            self._tasks.discard(task)
        if task.cancelled():
            self._refuse_closed()
            raise EngineUnavailable(f"{self.url}: no generation within {seconds:g} s")
        return task.result()

    async def _send_until_served(self, request: GenerationRequest) -> Generation:
        name = uuid.uuid4().hex
        for attempt, wait in enumerate((*BACK_OFF_S, None)):
            await self._before_attempt()
            try:
                return await self._send(request, f"{name}-{attempt}")
            except (NotReached, ConnectionLost, Overloaded) as error:
                if wait is None:
                    raise
                log.debug("%s; trying again in %g s", error, wait)
                await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def probe(self, timeout_s: float) -> None:
        """Sample one token, past every queue of this client. Raises ``EngineUnavailable`` when it
        does not come.
        """
        self._refuse_closed()
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(PROBE, f"probe-{uuid.uuid4().hex}", pooled=False)
        except TimeoutError as error:
            raise EngineUnavailable(
                f"{self.url}: the probe's token did not come within {timeout_s:g} s"
            ) from error

    async def _is_alive(self) -> bool:
        """Never raises: a server that does not answer is not alive."""
        if self._closed:
            return False
        try:
            await self._ask_health()
        except EngineFailure as failure:
            log.info("%s is not healthy: %s", self.url, failure)
            return False
        return True

    async def close(self) -> None:
        """Idempotent. Ends what is in flight, here and on the server, and closes the connections;
        the server lives on.
        """
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

    async def _call(
        self, method: str, path: str, body: object = None, timeout_s: float | None = None
    ) -> Any:
        """The content of a 200; None is the time of a control call. Raises ``EngineFailure`` on any
        other answer.
        """
        reply = await self._http.call(
            method, path, body, timeout_s=timeout_s or self._control_timeout_s
        )
        self._http.refuse_status(path, reply)
        return reply.content

    @contextlib.contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        """Failures to read a reply say whose it was."""
        try:
            yield
        except EngineUnavailable as error:
            raise EngineUnavailable(f"{self.url}{path}: {error}") from error
        except EngineFailure as error:
            raise EngineFailure(f"{self.url}{path}: {error}") from error
