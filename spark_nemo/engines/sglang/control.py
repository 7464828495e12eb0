"""SGLang's control calls as methods with checked replies. sglang-router forwards none of them: one
object per server.

Every method raises ``EngineUnavailable`` when the server does not answer in time, and
``EngineFailure`` with the server's own message when it says no.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base import EngineFailure
from ..http.client import NotReached
from ..http.engine import BACK_OFF_S, RemoteEngine
from .protocol import JSON, PauseMode, version_number

_FLUSHING_UPDATE = "an update with flush_cache=True"
_SECRET_WORDS = ("api_key", "password", "launch_command")


class ServerControl(RemoteEngine):
    """Control of one server. Remembers what it asked for: SGLang reports nowhere that it is paused."""

    pause_mode: PauseMode | None = None
    """How this client has paused the server; None while it generates."""

    @abc.abstractmethod
    def in_flight(self) -> int:
        """Requests of this client that the server is working on."""

    async def _pause(self, mode: PauseMode) -> None:
        """Stop sampling. While paused ``/health`` is 503, and a new generation waits and cannot be
        aborted.
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
        """Drop the prefix cache. The server refuses while requests run, unless paused in mode
        RETRACT.
        """
        await self._call("POST", "/flush_cache")

    async def abort_all(self) -> None:
        """End every request of this server; each returns with what it has."""
        await self._post("/abort_request", {"abort_all": True})

    async def begin_weight_update(self) -> None:
        """Open the session without which tensor and distributed updates are refused."""
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
        """Load a Hugging Face folder the server can read. No session needed; ``/v1/models`` is
        renamed to it.
        """
        if flush_cache:
            self._refuse_if_running(_FLUSHING_UPDATE)
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
        """Join a process group with the trainer. Blocks the server until all ranks are there: run
        it concurrently.
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

        Await this beside the broadcast: when the server refuses, it never joins, and the broadcast
        hangs.
        """
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(
                f"{len(names)} names, {len(dtypes)} dtypes, {len(shapes)} shapes: must be as many of each"
            )
        if flush_cache:
            self._refuse_if_running(_FLUSHING_UPDATE)
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
        """Load tensors of the same host by handle, one base64 payload per tensor-parallel rank,
        inside a session.
        """
        if flush_cache:
            self._refuse_if_running(_FLUSHING_UPDATE)
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
        """Name the present weights. Unlike SGLang's default this aborts nothing."""
        await self._succeed(
            "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}
        )

    async def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Give memory back (``kv_cache``, ``weights``, ``cuda_graph``; None = all), idle or paused
        in retract.
        """
        self._refuse_if_running("releasing memory")
        await self._post("/release_memory_occupation", _without_none({"tags": tags and list(tags)}))

    async def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again."""
        await self._post("/resume_memory_occupation", _without_none({"tags": tags and list(tags)}))

    async def weights_checksum(self) -> list[dict[str, str]]:
        """Checksum by the server's parameter name, one dictionary per rank. 0.5.21 can do this on a
        GPU only.
        """
        path = "/weights_checker"
        reply = await self._succeed(path, {"action": "checksum"})
        ranks = reply.get("ranks")
        if not isinstance(ranks, list) or not all(
            isinstance(rank, dict) and isinstance(rank.get("checksums"), dict) for rank in ranks
        ):
            raise EngineFailure(f"{self.url}{path}: ranks[].checksums is missing from the reply")
        return [rank["checksums"] for rank in ranks]

    async def model_info(self) -> JSON:
        """``/model_info``: model_path, weight_version and more. Answered by the front process, also
        when paused.
        """
        return await self._get("/model_info")

    async def weight_version(self) -> int:
        """The version the server stamps on what it samples now."""
        return version_number(
            (await self.model_info()).get("weight_version"), "model_info.weight_version"
        )

    async def server_info(self) -> JSON:
        """``/server_info`` without what SGLang shows there of its own secrets."""
        return _without_secrets(await self._get("/server_info"))

    async def _get(self, path: str) -> JSON:
        """A GET is safe to repeat while the server cannot be reached."""
        for wait in (*BACK_OFF_S, None):
            try:
                content = await self._call("GET", path)
                break
            except NotReached:
                if wait is None:
                    raise
                await asyncio.sleep(wait)
        if not isinstance(content, dict):
            raise EngineFailure(f"{self.url}{path}: expected a JSON object")
        return content

    async def _post(self, path: str, body: JSON, timeout_s: float | None = None) -> Any:
        return await self._call("POST", path, body, timeout_s)

    async def _succeed(self, path: str, body: JSON, timeout_s: float | None = None) -> JSON:
        """A call whose reply carries ``success``."""
        content = await self._post(path, body, timeout_s)
        self._require(content, path, "success", True)
        return content

    def _require(self, content: Any, path: str, field: str, wanted: object) -> None:
        if not isinstance(content, dict) or content.get(field) != wanted:
            raise EngineFailure(
                f"{self.url}{path}: {field} is not {wanted!r}: {self._http.excerpt(content)}"
            )

    def _refuse_if_running(self, action: str) -> None:
        """Some calls want an idle scheduler, or one paused in mode retract.

        SGLang 0.5.21 asserts it and dies: updates that flush while paused in place, release of
        memory. Not paused, an update waits until all running requests have ended, however long they
        are.
        """
        if self.in_flight() and self.pause_mode in (None, PauseMode.IN_PLACE):
            raise EngineFailure(
                f"{self.url}: {action} with {self.in_flight()} requests running kills the server or waits for all of "
                "them: pause in mode retract first"
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
