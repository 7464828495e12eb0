"""One vLLM server as an ``Engine``, through its OpenAI-compatible ``/v1/completions`` with token ids.

What it serves: stage I (solutions and verifications), the PRM, and evaluation. What it does not:

* **weight updates**: ``update_weights`` refuses, so stage III's policy cannot be a vLLM server;
* **log-probabilities under top-p or top-k**: vLLM has them before temperature or after the cut, never in between; they
  are NaN, which no loss survives unnoticed. Without a cut, ``processed_logprobs`` means what ours means;
  ``check_logprobs_mode`` asks the server whether it runs in that mode;
* **pause and resume**: they exist in vLLM's development mode only; refused here;
* **weight versions**: vLLM stamps none; every token carries the version the client was made with.

Seeds are honoured by vLLM (SGLang ignores them), though not with the embedded engine's draws.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

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
from ..sglang.control import BACK_OFF_S
from ..sglang.http import ConnectionLost, NotReached, Overloaded, ServerHttp
from ..sglang.protocol import ServerLimits
from .protocol import completion_json, parse_completion, top_logprob

log = logging.getLogger(__name__)

PATH = "/v1/completions"
_PROBE = GenerationRequest((0,), SamplingParams(max_new_tokens=1, temperature=0.0))
_SAME_NATS = 1e-3


class VllmServer(Engine):
    """A client of the server at ``url`` (``http://host:port``), owned by the first event loop that uses it.

    ``served_name`` is the server's ``--served-model-name``. At most ``max_in_flight`` requests are sent at once;
    ``request_timeout_s`` runs from then. A request that is late or whose caller is cancelled ends with its connection,
    which makes vLLM abort it. What never reached the server, lost its connection or met a 503 is sent again a few
    times; what fails after that is ``EngineUnavailable``.
    """

    def __init__(self, url: str, *, api_key: str | None, served_name: str, vocab_size: int, max_context: int,
                 max_in_flight: int, request_timeout_s: float, control_timeout_s: float,
                 weight_version: int = 0) -> None:
        for field, value in (("max_in_flight", max_in_flight), ("request_timeout_s", request_timeout_s),
                             ("control_timeout_s", control_timeout_s)):
            if value <= 0:
                raise ValueError(f"{field}={value}: must be positive")
        self.limits = ServerLimits(vocab_size, max_context)
        self._http = ServerHttp(url, api_key, max_in_flight)
        self._served_name, self._version = served_name, weight_version
        self._request_timeout_s, self._control_timeout_s = request_timeout_s, control_timeout_s
        self._slots = asyncio.Semaphore(max_in_flight)
        self._tasks: set[asyncio.Task[Generation]] = set()
        self._waiting = self._tokens_generated = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"VllmServer({self.url})"

    @property
    def url(self) -> str:
        """The server's base URL; also its name in messages."""
        return self._http.url

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``. Raises ``EngineUnavailable`` when another server could serve it.

        ``logprobs`` are NaN when top-p or top-k cut the distribution.
        """
        self._refuse_closed()
        self.limits.refuse_bad(request)
        body = completion_json(request, self._served_name)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            self._refuse_closed()
            generation = await self._within_deadline(request, body)
        finally:
            self._slots.release()
        self._tokens_generated += len(generation.token_ids)
        return generation

    async def _within_deadline(self, request: GenerationRequest, body: dict[str, object]) -> Generation:
        """In a task of its own, so that ``close`` can end it."""
        task = asyncio.create_task(self._send_until_served(request, body))
        self._tasks.add(task)
        try:
            await asyncio.wait([task], timeout=self._request_timeout_s)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            self._tasks.discard(task)
        if task.cancelled():
            self._refuse_closed()
            raise EngineUnavailable(f"{self.url}: no generation within {self._request_timeout_s:g} s")
        return task.result()

    async def _send_until_served(self, request: GenerationRequest, body: dict[str, object]) -> Generation:
        for wait in (*BACK_OFF_S, None):
            try:
                return await self._send(request, body)
            except (NotReached, ConnectionLost, Overloaded) as error:
                if wait is None:
                    raise
                log.info("%s; trying again in %g s", error, wait)
                await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _send(self, request: GenerationRequest, body: dict[str, object]) -> Generation:
        reply = await self._http.call("POST", PATH, body, timeout_s=None, pooled=True)
        self._http.refuse_status(PATH, reply)
        try:
            return parse_completion(reply.content, request, self._version)
        except EngineUnavailable as error:
            raise EngineUnavailable(f"{self.url}{PATH}: {error}") from error
        except EngineFailure as error:
            raise EngineFailure(f"{self.url}{PATH}: {error}") from error

    async def probe(self, timeout_s: float) -> None:
        """Sample one token, past every queue of this client. Raises ``EngineUnavailable`` when it does not come."""
        self._refuse_closed()
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(_PROBE, completion_json(_PROBE, self._served_name))
        except TimeoutError as error:
            raise EngineUnavailable(f"{self.url}: the probe's token did not come within {timeout_s:g} s") from error

    async def check_limits(self) -> None:
        """Raise ``EngineFailure`` when the server does not serve ``served_name`` with ``max_context`` tokens."""
        reply = await self._http.call("GET", "/v1/models", timeout_s=self._control_timeout_s)
        self._http.refuse_status("/v1/models", reply)
        models = reply.content.get("data") if isinstance(reply.content, dict) else None
        lengths = {row.get("id"): row.get("max_model_len") for row in models or [] if isinstance(row, dict)}
        if self._served_name not in lengths:
            raise EngineFailure(f"{self.url} serves {', '.join(map(str, lengths)) or 'nothing'}, not "
                                f"{self._served_name}: check --served-model-name")
        if (longest := lengths[self._served_name]) is None or longest < self.limits.max_context:
            raise EngineFailure(f"{self.url}: max_context={self.limits.max_context} is over the server's "
                                f"--max-model-len {longest}: lower engine.max_context or raise that")

    async def check_logprobs_mode(self) -> None:
        """Raise ``EngineFailure`` unless log-probabilities are taken after temperature.

        The likeliest token's is asked for at temperatures 1 and 2 (vLLM's highest); before temperature they are equal.
        """
        greedy = completion_json(_PROBE, self._served_name)
        (likeliest,) = parse_completion(await self._exchange(greedy), _PROBE, self._version).token_ids
        warm, hot = [top_logprob(await self._exchange({**greedy, "temperature": temperature, "logprobs": 1}), likeliest)
                     for temperature in (1.0, 2.0)]
        if abs(warm - hot) < _SAME_NATS:
            raise EngineFailure(f"{self.url}: log-probabilities are those before temperature; start it with "
                                "--logprobs-mode processed_logprobs")

    async def _exchange(self, body: dict[str, object]) -> object:
        reply = await self._http.call("POST", PATH, body, timeout_s=self._control_timeout_s)
        self._http.refuse_status(PATH, reply)
        return reply.content

    async def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Refused: stage III's policy needs engine.kind=local or sglang."""
        raise EngineFailure(f"{self.url}: weights of a vLLM server are not updated by this package; a policy in "
                            "training needs the embedded engine or SGLang")

    async def pause(self) -> None:
        """Refused: only vLLM's development mode has it."""
        raise EngineFailure(f"{self.url}: a vLLM server is not paused by this package")

    async def resume(self) -> None:
        """Nothing is ever paused."""

    async def health(self) -> EngineHealth:
        """Asks ``/health``. Never raises: a server that does not answer is not alive."""
        alive = not self._closed
        if alive:
            try:
                reply = await self._http.call("GET", "/health", timeout_s=self._control_timeout_s)
                self._http.refuse_status("/health", reply)
            except EngineFailure as failure:
                log.info("%s is not healthy: %s", self.url, failure)
                alive = False
        return EngineHealth(
            alive=alive, paused=False, running=len(self._tasks), waiting=self._waiting, weight_version=self._version,
            tokens_generated=self._tokens_generated)

    async def close(self) -> None:
        """Idempotent. Ends what is in flight and closes the connections; the server lives on."""
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
