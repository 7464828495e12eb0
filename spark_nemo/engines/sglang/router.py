"""sglang-router as the router of a fleet: cache-aware spreading of generation.

It forwards no control calls. The fleet alone decides which servers serve: the router's own retries
and circuit breaker are off. Its health checks admit a new server (without them it never serves) but
remove none, or a server that is only paused would be removed. A server that came back with old
weights gets no request through the router, because it is not listed there.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .. import server_wrapper
from ..base import Engine, EngineFailure, EngineHealth, Generation, GenerationRequest
from ..fleet import RouterHandle
from ..fleet.server_launcher import ServerProcess, free_port
from ..http.client import ServerHttp
from .server import SglangServer

_CALL_S = 10.0
_LISTED_WITHIN_S = 30.0
_POLL_S = 0.2
_NEVER = 1_000_000
_MISSING = "No module named 'sglang_router'"


class RouterClient(Engine):
    """An engine that generates through the router at ``url``, to which ``client`` is connected."""

    def __init__(self, url: str, key: str | None, client: SglangServer) -> None:
        self._http = ServerHttp(url, key, 1)
        self._client = client
        self._key = key
        self.max_in_flight = client.max_in_flight

    async def generate(self, request: GenerationRequest) -> Generation:
        """See ``Engine.generate``."""
        return await self._client.generate(request)

    async def probe(self, timeout_s: float) -> None:
        """Raise ``EngineFailure`` unless the router itself answers; servers are probed directly."""
        reply = await self._http.call("GET", "/liveness", timeout_s=timeout_s)
        self._http.require_ok("/liveness", reply)

    async def route_to(self, urls: Sequence[str]) -> None:
        """Have the router list exactly these servers.

        Raises ``EngineFailure`` when it does not within half a minute.
        """
        wanted = set(urls)
        listed = await self._listed()
        for url in wanted - set(listed):
            await self._call("POST", "/workers", {"url": url, "api_key": self._key})
        for url in set(listed) - wanted:
            await self._call("DELETE", f"/workers/{listed[url][0]}")
        # Polled, because the router replies before it has added or removed a server.
        for _ in range(int(_LISTED_WITHIN_S / _POLL_S)):
            listed = await self._listed()
            if set(listed) == wanted and all(ready for _, ready in listed.values()):
                return
            await asyncio.sleep(_POLL_S)
        raise EngineFailure(
            f"{self._http.url}: the router lists {sorted(listed)} instead of {sorted(wanted)} "
            f"after {_LISTED_WITHIN_S:.0f} s"
        )

    async def _listed(self) -> dict[str, tuple[str, bool]]:
        """Return URL -> the router's id of the server, and whether the server gets requests."""
        reply = await self._http.call("GET", "/workers", timeout_s=_CALL_S)
        self._http.require_ok("/workers", reply)
        return {
            worker["url"].rstrip("/"): (worker["id"], worker["is_healthy"])
            for worker in reply.content["workers"]
        }

    async def _call(self, method: str, path: str, body: object = None) -> None:
        reply = await self._http.call(method, path, body, timeout_s=_CALL_S)
        if reply.status not in (200, 202, 204):
            self._http.require_ok(path, reply)

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Raise ``EngineFailure``: a router forwards generation only."""
        raise EngineFailure("a router forwards no weights")

    async def pause(self) -> None:
        """Raise ``EngineFailure``: a router forwards generation only."""
        raise EngineFailure("a router forwards no pause")

    async def resume(self) -> None:
        """Raise ``EngineFailure``: a router forwards generation only."""
        raise EngineFailure("a router forwards no resume")

    async def health(self) -> EngineHealth:
        """Report this client's state; the router has none of its own."""
        return EngineHealth(
            alive=True,
            paused=False,
            running=self._client.in_flight(),
            waiting=0,
            weight_version=0,
            tokens_generated=0,
        )

    async def close(self) -> None:
        """See ``Engine.close``; idempotent."""
        await self._client.close()
        await self._http.close()


class RouterProcess(ServerProcess, RouterHandle):
    """Launch a router. ``connect(url)`` makes a client that generates through it.

    ``request_timeout_s`` must be beyond every deadline of the fleet, which then decides alone. The
    router's default is 1800 s.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[str], SglangServer],
        *,
        python: str,
        host: str,
        key: str | None,
        log_path: Path,
        environment: Mapping[str, str],
        max_restarts: int,
        request_timeout_s: float,
    ) -> None:
        def command(host: str, port: int) -> list[str]:
            return [
                python,
                server_wrapper.__file__,
                "router",
                "--host",
                host,
                "--port",
                str(port),
                "--policy",
                "cache_aware",
                "--prometheus-host",
                host,
                "--prometheus-port",
                str(free_port(host)),
                "--disable-retries",
                "--disable-circuit-breaker",
                "--health-check-interval-secs",
                "1",
                "--health-success-threshold",
                "1",
                "--health-failure-threshold",
                str(_NEVER),
                "--request-timeout-secs",
                str(math.ceil(request_timeout_s)),
                "--log-level",
                "warn",
            ]

        super().__init__(
            name,
            command,
            lambda url: RouterClient(url, key, connect(url)),
            log_path=log_path,
            environment={**environment, server_wrapper.KEY_VARIABLE: key or ""},
            host=host,
            start_timeout_s=60.0,
            max_restarts=max_restarts,
        )
        self._client: RouterClient | None = None

    async def start(self) -> Engine:
        """See ``ServerLauncher.start``; says so when the router's package is missing."""
        try:
            engine = await super().start()
        except EngineFailure as failure:
            if _MISSING in str(failure):
                raise EngineFailure(
                    f"{self.name}: router=true needs the package sglang-router in the servers' "
                    "environment; install it there or set router=false"
                ) from failure
            raise
        assert isinstance(engine, RouterClient)
        self._client = engine
        return engine

    async def route_to(self, engines: Sequence[Engine]) -> None:
        """See ``RouterHandle.route_to``."""
        assert self._client is not None
        await self._client.route_to(
            [engine.url for engine in engines if isinstance(engine, SglangServer)]
        )
