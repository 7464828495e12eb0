"""HTTP to one server: sessions, the API key, and the meaning of a reply or its absence.

The key travels in the Authorization header only. It is removed from every text of a server before
the text is shown, because SGLang repeats its own arguments in places.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import aiohttp
import yarl

from ..base import EngineFailure, EngineUnavailable

KEEP_ALIVE_S = 3.0
"""Below uvicorn's 5 s: an idle connection is closed here before the server closes it under a new
request.
"""
CONNECT_TIMEOUT_S = 5.0
_EXCERPT = 300


class NotReached(EngineUnavailable):
    """No connection: the call did not reach the server."""


class ConnectionLost(EngineUnavailable):
    """The connection broke after the call was sent: the server may have done it."""


class TimedOut(EngineUnavailable):
    """No reply in time: the server may still work on the call."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete reply. ``content`` is the JSON of the body, or its text when it is not JSON."""

    status: int
    content: Any


class ServerHttp:
    """Calls to one base URL.

    ``connections`` bounds the concurrent calls of generation; control calls open their own.
    """

    def __init__(self, url: str, api_key: str | None, connections: int) -> None:
        parsed = yarl.URL(url)
        if parsed.user or parsed.password:
            raise ValueError(
                f"server url of host {parsed.host}: credentials do not belong in a URL; use api_key"
            )
        if (
            parsed.scheme not in ("http", "https")
            or not parsed.host
            or parsed.path not in ("", "/")
            or parsed.query
        ):
            raise ValueError(f"server url {url}: write http://host:port")
        self.url = str(parsed).rstrip("/")
        self._api_key = api_key
        self._connections = connections
        self._pooled: aiohttp.ClientSession | None = None
        self._single: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"ServerHttp({self.url})"

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        timeout_s: float | None,
        pooled: bool = False,
    ) -> Reply:
        """Make one exchange, without retries. ``timeout_s=None`` leaves the deadline to the caller.

        Raises ``NotReached``, ``ConnectionLost`` or ``TimedOut``, and ``EngineUnavailable`` on a
        5xx. Other statuses are returned.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        where = f"{self.url}{path}"
        try:
            async with self._session(pooled).request(
                method, self.url + path, json=body, timeout=timeout
            ) as response:
                reply = Reply(response.status, self._content(await response.read()))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise NotReached(f"{where}: cannot connect: {self._safe(str(error))}") from error
        except TimeoutError as error:
            raise TimedOut(f"{where}: no answer within {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise ConnectionLost(
                f"{where}: {type(error).__name__}: {self._safe(str(error))}"
            ) from error
        if reply.status >= 500:
            raise EngineUnavailable(f"{where}: {reply.status} {self.excerpt(reply.content)}")
        return reply

    def require_ok(self, path: str, reply: Reply) -> None:
        """Raise ``EngineFailure`` with the server's message unless ``reply`` is a 200."""
        if reply.status == 401:
            raise EngineFailure(f"{self.url}{path}: 401: the server expects another API key")
        if reply.status != 200:
            raise EngineFailure(f"{self.url}{path}: {reply.status} {self.excerpt(reply.content)}")

    def excerpt(self, content: Any) -> str:
        """Return a server's message, shortened and without the key."""
        message = content
        if isinstance(content, dict):
            # SGLang wraps errors in three ways: {error: {message}}, {error}, {message}.
            error = content.get("error")
            if isinstance(error, dict):
                message = error.get("message")
            else:
                message = error or content.get("message") or content
        if not isinstance(message, str):
            message = json.dumps(message)
        text = " ".join(message.split())
        if len(text) > _EXCERPT:
            text = text[:_EXCERPT] + " ..."
        return self._safe(text)

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        for session in (self._pooled, self._single):
            if session is not None:
                await session.close()
        self._pooled = self._single = None

    def _session(self, pooled: bool) -> aiohttp.ClientSession:
        """Return a session, created on first use: it belongs to the event loop it is made in."""
        if self._pooled is None or self._single is None:
            headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
            self._pooled = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(
                    limit=self._connections, keepalive_timeout=KEEP_ALIVE_S
                ),
            )
            # Most control calls must not be sent twice, so each opens a connection: a kept one
            # may be closed by the server just as the call is sent.
            self._single = aiohttp.ClientSession(
                headers=headers, connector=aiohttp.TCPConnector(limit=0, force_close=True)
            )
        return self._pooled if pooled else self._single

    @staticmethod
    def _content(body: bytes) -> Any:
        with contextlib.suppress(ValueError):
            return json.loads(body)
        return body.decode(errors="replace")

    def _safe(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text
