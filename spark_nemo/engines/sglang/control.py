"""SGLang's control calls as methods with checked replies.

sglang-router forwards none of them: there is one object per server. Every method raises
``EngineUnavailable`` when the server does not answer in time, and ``EngineFailure`` with the
server's message when the server rejects the call.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base import EngineFailure
from ..http.client import NotReached
from ..http.engine import RemoteEngine
from .protocol import JSON, PauseMode, version_number

_GET_BACKOFF_S = (0.1, 0.5)
_FLUSHING_UPDATE = "an update with flush_cache=True"
_SECRET_WORDS = ("api_key", "password", "launch_command")


class ServerControl(RemoteEngine):
    """Control of one server; remembers the pause mode, which SGLang does not report."""

    pause_mode: PauseMode | None = None
    """Mode in which this client has paused the server; None while it generates."""

    @abc.abstractmethod
    def in_flight(self) -> int:
        """Return the number of this client's requests that the server is working on."""

    async def _pause(self, mode: PauseMode) -> None:
        """Stop sampling.

        While paused ``/health`` is 503, and a new generation waits and cannot be aborted.
        """
        reply = await self._post("/pause_generation", {"mode": str(PauseMode(mode))})
        self._require(reply, "/pause_generation", "status", "ok")
        self.pause_mode = PauseMode(mode)

    async def _continue(self) -> None:
        """Go on sampling; harmless when not paused."""
        self._require(
            await self._post("/continue_generation", {}), "/continue_generation", "status", "ok"
        )
        self.pause_mode = None

    async def flush_cache(self) -> None:
        """Drop the prefix cache.

        The server rejects this while requests run, unless it is paused in mode RETRACT.
        """
        await self._call("POST", "/flush_cache")

    async def abort_all(self) -> None:
        """End every request of this server; each returns with the tokens it has."""
        await self._post("/abort_request", {"abort_all": True})

    async def begin_weight_update(self) -> None:
        """Open the session without which tensor and distributed updates are rejected."""
        await self._succeed("/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        """Close the session."""
        await self._succeed("/end_weight_update", {})

    async def update_weights_from_disk(
        self,
        folder: Path | str,
        version: int,
        *,
        flush_cache: bool = True,
        timeout_s: float | None = None,
    ) -> None:
        """Load a Hugging Face folder that the server can read; needs no session.

        The server then names its model in ``/v1/models`` after the folder.
        """
        if flush_cache:
            self._require_idle(_FLUSHING_UPDATE)
        await self._succeed(
            "/update_weights_from_disk",
            {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush_cache},
            timeout_s,
        )

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float | None = None,
    ) -> None:
        """Join a process group with the trainer; call it while the trainer's ranks join.

        Blocks the server until all ranks have joined.
        """
        await self._succeed(
            "/init_weights_update_group",
            {
                "master_address": master_address,
                "master_port": master_port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
            timeout_s,
        )

    async def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave the process group."""
        await self._succeed("/destroy_weights_update_group", {"group_name": group_name})

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        version: int | None = None,
        flush_cache: bool = False,
        load_format: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Receive one bucket by broadcast from rank 0 of ``group_name``, inside a session.

        Await this while the broadcast runs: a server that rejects the call never joins the
        broadcast, which then hangs.
        """
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(
                f"{len(names)} names, {len(dtypes)} dtypes, {len(shapes)} shapes: give as many of "
                "each"
            )
        if flush_cache:
            self._require_idle(_FLUSHING_UPDATE)
        await self._succeed(
            "/update_weights_from_distributed",
            _without_none(
                {
                    "names": list(names),
                    "dtypes": list(dtypes),
                    "shapes": [list(shape) for shape in shapes],
                    "group_name": group_name,
                    "flush_cache": flush_cache,
                    "load_format": load_format,
                    "weight_version": _text(version),
                }
            ),
            timeout_s,
        )

    async def update_weights_from_tensor(
        self,
        serialized_named_tensors: Sequence[str],
        *,
        version: int | None = None,
        flush_cache: bool = False,
        load_format: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Load tensors of the same host by handle, inside a session.

        There is one base64 payload per tensor-parallel rank.
        """
        if flush_cache:
            self._require_idle(_FLUSHING_UPDATE)
        await self._succeed(
            "/update_weights_from_tensor",
            _without_none(
                {
                    "serialized_named_tensors": list(serialized_named_tensors),
                    "flush_cache": flush_cache,
                    "load_format": load_format,
                    "weight_version": _text(version),
                }
            ),
            timeout_s,
        )

    async def update_weight_version(self, version: int) -> None:
        """Name the present weights without aborting requests, as SGLang would by default."""
        await self._succeed(
            "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}
        )

    async def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Release memory (``kv_cache``, ``weights``, ``cuda_graph``; None is all).

        The server must be idle or paused in mode RETRACT.
        """
        self._require_idle("releasing memory")
        await self._post("/release_memory_occupation", _without_none({"tags": tags and list(tags)}))

    async def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Allocate released memory again."""
        await self._post("/resume_memory_occupation", _without_none({"tags": tags and list(tags)}))

    async def weights_checksum(self) -> list[dict[str, str]]:
        """See ``Engine.weights_checksum``. SGLang 0.5.21 can do this on a GPU only."""
        path = "/weights_checker"
        reply = await self._succeed(path, {"action": "checksum"})
        ranks = reply.get("ranks")
        if not isinstance(ranks, list) or not all(
            isinstance(rank, dict) and isinstance(rank.get("checksums"), dict) for rank in ranks
        ):
            raise EngineFailure(f"{self.url}{path}: ranks[].checksums is missing from the reply")
        return [rank["checksums"] for rank in ranks]

    async def model_info(self) -> JSON:
        """Return ``/model_info`` (model_path, weight_version, ...); works also when paused."""
        return await self._get("/model_info")

    async def weight_version(self) -> int:
        """Return the version that the server stamps on the tokens it samples now."""
        return version_number(
            (await self.model_info()).get("weight_version"), "model_info.weight_version"
        )

    async def server_info(self) -> JSON:
        """Return ``/server_info`` without the fields in which SGLang shows its secrets."""
        return _without_secrets(await self._get("/server_info"))

    async def _get(self, path: str) -> JSON:
        """Call a GET, which is safe to repeat while the server cannot be reached."""
        for pause_s in _GET_BACKOFF_S:
            try:
                return self._object(path, await self._call("GET", path))
            except NotReached:
                await asyncio.sleep(pause_s)
        return self._object(path, await self._call("GET", path))

    def _object(self, path: str, content: Any) -> JSON:
        if not isinstance(content, dict):
            raise EngineFailure(f"{self.url}{path}: expected a JSON object")
        return content

    async def _post(self, path: str, body: JSON, timeout_s: float | None = None) -> Any:
        return await self._call("POST", path, body, timeout_s)

    async def _succeed(self, path: str, body: JSON, timeout_s: float | None = None) -> JSON:
        """Make a call whose reply carries ``success``."""
        content = await self._post(path, body, timeout_s)
        self._require(content, path, "success", True)
        return content

    def _require(self, content: Any, path: str, field: str, wanted: object) -> None:
        if not isinstance(content, dict) or content.get(field) != wanted:
            raise EngineFailure(
                f"{self.url}{path}: {field} is not {wanted!r}: {self._http.excerpt(content)}"
            )

    def _require_idle(self, action: str) -> None:
        """Raise ``EngineFailure`` while requests run, unless paused in mode RETRACT.

        SGLang 0.5.21 dies of an assertion when memory is released or when an update flushes while
        paused in place. Not paused, an update waits until all running requests have ended.
        """
        if self.in_flight() and self.pause_mode in (None, PauseMode.IN_PLACE):
            raise EngineFailure(
                f"{self.url}: {action} with {self.in_flight()} requests running kills the server "
                "or waits for all of them: pause in mode retract first"
            )


def _text(version: int | None) -> str | None:
    return None if version is None else str(version)


def _without_none(body: JSON) -> JSON:
    return {name: value for name, value in body.items() if value is not None}


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_secrets(item)
            for name, item in value.items()
            if not any(word in name for word in _SECRET_WORDS)
        }
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return value
