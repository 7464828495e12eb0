"""A fake SGLang server: the protocol of docs/engines.md, with a hash for a model. It needs no torch
and no spark_nemo.

Its replies and rejections are those observed of 0.5.21;
``tests/real_sglang/test_fake_is_faithful.py`` compares the two. Its tokens depend on the weights'
name, the last token and the position, so other weights give other tokens. In a test:

    async with FakeSglang() as fake:     # in this process; look at fake.calls, set fake.faults
    with fake_process(port) as process:  # fake_sglang_process: to be killed or stopped
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from aiohttp import web

SAMPLING = {
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop_token_ids",
    "ignore_eos",
    "sampling_seed",
    "n",
    "stop",
    "skip_special_tokens",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "min_new_tokens",
}
RESERVED_INPUT = 6
RESERVED_TOTAL = 2
"""SGLang keeps 6 tokens of its context from prompts and samples up to 2 tokens short of it."""


@dataclass
class Faults:
    """Faults to produce. Counters count down with each ``/generate``."""

    token_s: float = 0.0
    hang: bool = False
    starting: bool = False
    drop: int = 0
    fail: int = 0
    fail_status: int = 503
    abort: int = 0
    abort_status: int | None = None


@dataclass(eq=False)
class Running:
    """One request being served."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    retractions: int = 0
    aborted: dict | None = None


class FakeSglang:
    """One server. ``calls`` lists (path, body) in order of arrival; ``most_running`` is the
    high-water mark.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        context: int = 128,
        eos_id: int = 2,
        api_key: str | None = None,
        model: str = "model-0",
        version: str = "0",
        health_wait_s: float = 0.2,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.context = context
        self.eos_id = eos_id
        self.api_key = api_key
        self.model = model
        self.version = version
        self.health_wait_s = health_wait_s
        self.faults = Faults()
        self.edit_reply: Callable[[dict], object] = lambda reply: reply
        self.calls: list[tuple[str, dict]] = []
        self.authorizations: list[str | None] = []
        self.running: dict[str, Running] = {}
        self.pause: str | None = None
        self.session = False
        self.groups: set[str] = set()
        self.flushes = 0
        self.most_running = 0
        self.dead = False
        self._open: dict[int, web.Request] = {}
        self._on_death = on_death
        self._runner: web.AppRunner | None = None
        self.url = ""

    # life

    async def __aenter__(self) -> FakeSglang:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> None:
        app = web.Application(middlewares=[self._door])
        app.add_routes([web.get(path, getattr(self, name)) for path, name in GETS.items()])
        app.add_routes([web.post(path, getattr(self, name)) for path, name in POSTS.items()])
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        runner = self._runner
        self._runner = None
        if runner is not None:
            await runner.cleanup()

    def die(self, request: web.Request) -> web.Response:
        """As SGLang dies of what its scheduler cannot take: the process tree is gone, connections
        break.
        """
        self.dead = True
        if self._on_death is not None:
            self._on_death()
        for other in [*self._open.values(), request]:
            self._drop(other)
        return web.Response()

    @web.middleware
    async def _door(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        if self.dead:
            return self.die(request)
        self.calls.append((request.path, body))
        self.authorizations.append(request.headers.get("Authorization"))
        open_ = request.path in ("/health", "/ready", "/_faults")
        if self.api_key and not open_ and self.authorizations[-1] != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        request["body"] = body
        self._open[id(request)] = request
        try:
            return await handler(request)
        finally:
            del self._open[id(request)]

    @staticmethod
    def _drop(request: web.Request) -> None:
        if request.transport is not None:
            request.transport.abort()

    # generation

    async def generate(self, request: web.Request) -> web.Response:
        body = request["body"]
        faults = self.faults
        if faults.drop:
            faults.drop -= 1
            self._drop(request)
            return web.Response()
        if faults.fail:
            faults.fail -= 1
            return web.Response(status=faults.fail_status, text="Internal Server Error")
        refusal = self._refusal(body)
        if refusal is not None:
            return refusal
        if any(not 0 <= token < self.vocab_size for token in body["input_ids"]):
            return self.die(request)
        rid = body.get("rid") or os.urandom(8).hex()
        if rid in self.running:
            return _error(f"Duplicate request ID detected: {rid}")
        while self.pause is not None and not self.dead:
            await asyncio.sleep(0.002)
        state = self.running[rid] = Running()
        self.most_running = max(self.most_running, len(self.running))
        try:
            finish = await self._sample(request, body, state)
        finally:
            self.running.pop(rid, None)
        return web.json_response(self.edit_reply(self._reply(rid, body, state, finish)))

    def _refusal(self, body: dict) -> web.Response | None:
        ids = body.get("input_ids")
        params = body.get("sampling_params") or {}
        if ids is None:
            return _error("Either text, input_ids or input_embeds should be provided.")
        if not ids:
            return _error("input_ids cannot be empty.")
        if set(params) - SAMPLING:
            return web.Response(status=500, text="Internal Server Error")
        if params.get("temperature", 1.0) < 0:
            return _error(f"temperature must be non-negative, got {params['temperature']}.")
        total = len(ids) + params.get("max_new_tokens", 128)
        if total > self.context:
            return _error(
                f"Requested token count exceeds the model's maximum context length of "
                f"{self.context} tokens."
            )
        if len(ids) >= self.context - RESERVED_INPUT:
            return _error(
                f"Input length ({len(ids)} tokens) exceeds the maximum allowed length "
                f"({self.context - RESERVED_INPUT} tokens)."
            )
        return None

    async def _sample(self, request: web.Request, body: dict, state: Running) -> dict:
        ids = list(body["input_ids"])
        params = body.get("sampling_params") or {}
        room = min(params.get("max_new_tokens", 128), self.context - RESERVED_TOTAL - len(ids))
        stops = (
            set() if params.get("ignore_eos") else {self.eos_id, *params.get("stop_token_ids", ())}
        )
        if self.faults.abort:
            self.faults.abort -= 1
            state.aborted = {"message": "Aborted", "status_code": self.faults.abort_status}
        while len(state.tokens) < room:
            await asyncio.sleep(self.faults.token_s)
            while (
                state.aborted is None
                and not self.dead
                and (self.pause is not None or self.faults.hang)
            ):
                await asyncio.sleep(0.002)
            if request.transport is None or request.transport.is_closing():
                state.aborted = state.aborted or {"message": "disconnected", "status_code": None}
            if state.aborted is not None:
                return {"type": "abort", "err_type": None, **state.aborted}
            token, logprob = self._next(ids + state.tokens, params)
            state.tokens.append(token)
            state.logprobs.append(logprob)
            state.versions.append(self.version)
            if token in stops:
                return {"type": "stop", "matched": token}
        return {"type": "length", "length": room}

    def _next(self, ids: list[int], params: dict) -> tuple[int, float]:
        """A token and its log-probability after temperature; greedy counts as temperature 1."""
        seed = hashlib.sha256(f"{self.model} {ids[-1]} {len(ids)}".encode()).digest()[:8]
        logits_V = 3 * np.random.default_rng(int.from_bytes(seed)).standard_normal(self.vocab_size)
        temperature = params.get("temperature", 1.0)
        logp_V = logits_V / (temperature or 1.0)
        logp_V = logp_V - np.log(np.exp(logp_V - logp_V.max()).sum()) - logp_V.max()
        token = (
            int(logp_V.argmax())
            if temperature == 0
            else int(np.random.choice(self.vocab_size, p=np.exp(logp_V)))
        )
        return token, float(logp_V[token])

    def _reply(self, rid: str, body: dict, state: Running, finish: dict) -> dict:
        ranges: list[dict] = []
        for position, version in enumerate(state.versions):
            if not ranges or ranges[-1]["version"] != version:
                ranges.append({"version": version, "start": position, "end": position})
            ranges[-1]["end"] = position + 1
        meta = {
            "id": rid,
            "finish_reason": finish,
            "prompt_tokens": len(body["input_ids"]),
            "weight_version": self.version,
            "num_retractions": state.retractions,
            "reasoning_tokens": 0,
            "completion_tokens": len(state.tokens),
            "cached_tokens": 0,
            "weight_versions": ranges,
            "cached_tokens_details": None,
            "dp_rank": None,
            "e2e_latency": 0.0,
            "response_sent_to_client_ts": time.time(),
        }
        if body.get("return_logprob"):
            entries = [
                [logprob, token, None] for logprob, token in zip(state.logprobs, state.tokens)
            ]
            meta |= {
                "input_token_logprobs": [],
                "output_token_logprobs": entries,
                "output_token_logprobs_length": len(entries),
            }
        return {"text": "", "output_ids": state.tokens, "meta_info": meta}

    # control

    async def abort_request(self, request: web.Request) -> web.Response:
        body = request["body"]
        for rid, state in self.running.items():
            if body.get("abort_all") or rid == body.get("rid"):
                state.aborted = {"message": "Aborted", "status_code": None}
        return web.Response()

    async def pause_generation(self, request: web.Request) -> web.Response:
        mode = request["body"].get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return web.json_response(
                {"object": "error", "message": "2 validation errors", "code": 400}, status=400
            )
        self.pause = mode
        for state in self.running.values():
            if mode == "abort":
                state.aborted = {"message": "Aborted", "status_code": None}
            state.retractions += mode == "retract"
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: web.Request) -> web.Response:
        self.pause = None
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    def _idle(self) -> bool:
        """Retracted requests wait in the queue, which a paused scheduler overlooks."""
        return not self.running or self.pause in ("retract", "abort")

    async def flush_cache(self, request: web.Request) -> web.Response:
        if not self._idle():
            return web.Response(status=400, text="Flush cache failed.\n")
        self.flushes += 1
        return web.Response(text="Cache flushed.\n")

    async def _load(self, request: web.Request, model: str) -> web.Response:
        body = request["body"]
        while self.running and self.pause is None:
            await asyncio.sleep(0.002)
        self.model = model
        if body.get("flush_cache", True):
            if not self._idle():
                return self.die(request)  # its scheduler asserts that the flush succeeded
            self.flushes += 1
        if body.get("weight_version") is not None:
            self.version = body["weight_version"]
        return _success()

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        folder = Path(request["body"]["model_path"])
        if not (folder / "config.json").exists():
            return _success(
                f"Failed to get weights iterator: '{folder}'.", False, num_paused_requests=0
            )
        weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
        reply = await self._load(request, hashlib.sha256(weights).hexdigest())
        return reply if self.dead else _success(num_paused_requests=0)

    async def begin_weight_update(self, request: web.Request) -> web.Response:
        if self.session:
            return _success(
                "a weight-update session is already open; call end_weight_update() first", False
            )
        self.session = True
        return _success()

    async def end_weight_update(self, request: web.Request) -> web.Response:
        if not self.session:
            return _success(
                "no weight-update session is open; call begin_weight_update() first", False
            )
        self.session = False
        return _success()

    async def init_weights_update_group(self, request: web.Request) -> web.Response:
        self.groups.add(request["body"]["group_name"])
        return _success("Succeeded to initialize custom process group.")

    async def destroy_weights_update_group(self, request: web.Request) -> web.Response:
        if request["body"]["group_name"] not in self.groups:
            return _success("The group to be destroyed does not exist.", False)
        self.groups.remove(request["body"]["group_name"])
        return _success("Succeeded to destroy custom process group.")

    async def update_weights_from_distributed(self, request: web.Request) -> web.Response:
        body = request["body"]
        if not self.session:
            return _outside_session("update_weights_from_distributed")
        if body["group_name"] not in self.groups:
            return _success(
                f"Failed to receive weights: Group {body['group_name']} not in [].", False
            )
        return await self._load(request, f"{self.model} {body['names']}")

    async def update_weights_from_tensor(self, request: web.Request) -> web.Response:
        if not self.session:
            return _outside_session("update_weights_from_tensor")
        return await self._load(
            request, f"{self.model} {request['body']['serialized_named_tensors']}"
        )

    async def update_weight_version(self, request: web.Request) -> web.Response:
        body = request["body"]
        if body.get("abort_all_requests", True):
            for state in self.running.values():
                state.aborted = {"message": "Aborted", "status_code": None}
        self.version = body["new_version"]
        return _success(f"Weight version updated to {self.version}", new_version=self.version)

    async def occupation(self, request: web.Request) -> web.Response:
        if request.path.startswith("/release") and not self._idle():
            return self.die(request)
        return web.json_response(None)

    async def weights_checker(self, request: web.Request) -> web.Response:
        return _success("Torch not compiled with CUDA enabled", False)

    async def health(self, request: web.Request) -> web.Response:
        if self.faults.starting:  # its own warm-up has not ended; it generates all the same
            return web.Response(status=503)
        stuck = self.pause is not None or self.faults.hang
        await asyncio.sleep(self.health_wait_s if stuck else 0)
        return web.Response(status=503 if stuck else 200)

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "model_path": self.model,
                "served_model_name": self.model,
                "is_generation": True,
                "weight_version": self.version,
                "model_type": "qwen2",
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        arguments = {"api_key": self.api_key, "admin_api_key": None, "context_length": None}
        return web.json_response(
            {
                **arguments,
                "launch_command": f"--api-key {self.api_key}",
                "max_req_input_len": self.context - 6,
                "internal_states": [dict(arguments)],
                "version": "0.5.21",
            }
        )

    async def set_faults(self, request: web.Request) -> web.Response:
        self.faults = Faults(**request["body"])
        return _success()


GETS = {
    "/health": "health",
    "/ready": "ready",
    "/model_info": "model_info",
    "/server_info": "server_info",
}
POSTS = {
    "/generate": "generate",
    "/abort_request": "abort_request",
    "/_faults": "set_faults",
    "/release_memory_occupation": "occupation",
    "/resume_memory_occupation": "occupation",
    **{
        f"/{name}": name
        for name in (
            "pause_generation",
            "continue_generation",
            "flush_cache",
            "update_weights_from_disk",
            "begin_weight_update",
            "end_weight_update",
            "init_weights_update_group",
            "destroy_weights_update_group",
            "weights_checker",
            "update_weights_from_distributed",
            "update_weights_from_tensor",
            "update_weight_version",
        )
    },
}


def _error(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)


def _success(message: str = "Success", success: bool = True, **more: object) -> web.Response:
    return web.json_response(
        {"success": success, "message": message, **more}, status=200 if success else 400
    )


def _outside_session(call: str) -> web.Response:
    return _success(f"{call} must run between begin_weight_update() and end_weight_update()", False)
