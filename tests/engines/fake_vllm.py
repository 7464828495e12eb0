"""A vLLM server in this process: the part of 0.32.0's protocol that the client uses, and faults on
demand.

Its "model" has log-probabilities that depend on the last token alone, so a client's reading of them
can be checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from aiohttp import web

VOCAB, CONTEXT, NAME, KEY = 16, 64, "policy", "fake-key"


def logprobs_after(token: int, temperature: float = 1.0) -> list[float]:
    """Log-probabilities of the next token, after temperature."""
    logits = [((7 * token + 3 * k) % VOCAB) / (4 * (temperature or 1.0)) for k in range(VOCAB)]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


class FakeVllm:
    """A server that waits ``delay_s`` before every reply, which ``change`` may edit.

    ``statuses`` are returned first, one per request. ``bodies`` are the requests received,
    ``cancelled`` counts those whose client disconnected, ``most`` is the most at one time.
    """

    def __init__(self, processed: bool = True) -> None:
        self.processed = processed
        self.healthy = True
        self.delay_s = 0.0
        self.statuses = []
        self.change = lambda reply: reply
        self.bodies = []
        self.cancelled = 0
        self.running = 0
        self.most = 0

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """The URL, while the block runs."""
        app = web.Application(middlewares=[self._authorise])
        app.add_routes(
            [
                web.post("/v1/completions", self._complete),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
            ]
        )
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        finally:
            await runner.cleanup()

    @web.middleware
    async def _authorise(self, request: web.Request, handler):
        if (
            request.path.startswith("/v1")
            and request.headers.get("Authorization") != f"Bearer {KEY}"
        ):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": NAME, "max_model_len": CONTEXT}]}
        )

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.statuses:
            return web.json_response(
                {"error": {"message": "not now", "code": 0}}, status=self.statuses.pop(0)
            )
        if body["temperature"] > 2:
            return web.json_response(
                {"error": {"message": "temperature must be in [0, 2]", "code": 400}}, status=400
            )
        return web.json_response(self.change(self._reply(body)))

    def _reply(self, body: dict) -> dict:
        """Always the likeliest token, whatever the temperature; it stops like vLLM."""
        ids, numbers, top = [], [], []
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body["stop_token_ids"]):
            temperature = body["temperature"] if self.processed else 1.0
            row = logprobs_after((body["prompt"] + ids)[-1], temperature)
            ids.append(row.index(max(row)))
            numbers.append(max(row))
            top.append({f"token_id:{ids[-1]}": max(row)})
        stopped = ids[-1] in body["stop_token_ids"]
        logprobs = (
            None
            if "logprobs" not in body
            else {
                "token_logprobs": numbers,
                "tokens": [f"token_id:{token}" for token in ids],
                "top_logprobs": top,
            }
        )
        return {
            "object": "text_completion",
            "model": NAME,
            "choices": [
                {
                    "index": 0,
                    "text": "not read",
                    "logprobs": logprobs,
                    "finish_reason": "stop" if stopped else "length",
                    "stop_reason": ids[-1] if stopped else None,
                    "token_ids": ids,
                    "prompt_token_ids": body["prompt"],
                }
            ],
        }
