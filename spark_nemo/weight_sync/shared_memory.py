"""Weights by shared memory: servers on the main rank's machine map the buffer of a bucket.

The buffer is a file in /dev/shm, also when the model is on a GPU: one copy down and one up, and no
CUDA IPC.
"""

from __future__ import annotations

import base64
import contextlib
import io
import ipaddress
import socket
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from urllib.parse import urlsplit

import torch
import torch.multiprocessing as mp

from spark_nemo.engines.base import Engine, EngineFailure

from .distributed import local_address_towards
from .transport import Targets, TransferBroken, Transport, each
from .weight_stream import Bucket, Export


class TensorTransport(Transport):
    """Calls ``update_weights_from_tensor`` with handles, one per tensor-parallel rank of a server."""

    def __init__(self, engine_tensor_parallel: int, timeout_s: float) -> None:
        self.engine_tensor_parallel = engine_tensor_parallel
        self.timeout_s = timeout_s

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``."""
        for engine in targets.remaining:
            check_same_machine(str(getattr(engine, "url", "http://127.0.0.1")))
        if export.plan.largest_bytes > export.plan.bucket_bytes:
            needed = -(-export.plan.largest_bytes // (1 << 20))
            raise EngineFailure(
                "weight_sync.transport=tensor shares one buffer and the largest tensor does not fit: "
                f"set weight_sync.bucket_mb to at least {needed}"
            )
        await each(
            targets,
            lambda engine: engine.begin_weight_update(),
            self.timeout_s,
            "begin_weight_update",
        )
        with _file_system_sharing():
            buffer_B = torch.empty(export.plan.buffer_bytes, dtype=torch.uint8)
            buffer_B.share_memory_()
            # The next bucket overwrites the buffer, so every server must have copied this one.
            for bucket in export.buckets(buffer_B):
                await self._load(bucket, targets, version)
                if not targets.remaining:
                    break
        await each(
            targets, lambda engine: engine.end_weight_update(), self.timeout_s, "end_weight_update"
        )
        if not targets.remaining:
            raise TransferBroken("; ".join(str(error) for error in targets.errors.values()))

    async def _load(self, bucket: Bucket, targets: Targets, version: int) -> None:
        async def load(engine: Engine) -> None:
            # Pickling takes a reference to the memory that opening the payload gives back. A payload
            # opened twice would free the buffer while it is in use, so each rank has its own.
            payloads = [serialize(bucket.tensors()) for _ in range(self.engine_tensor_parallel)]
            await engine.update_weights_from_tensor(  # type: ignore[attr-defined]
                payloads,
                flush_cache=False,
                timeout_s=self.timeout_s,
                version=version if bucket.is_last else None,
            )

        await each(targets, load, self.timeout_s, "loading a bucket")


def serialize(named: list[tuple[str, torch.Tensor]]) -> str:
    """Return handles of ``named`` in the format of SGLang's ``MultiprocessingSerializer``."""
    stream = io.BytesIO()
    ForkingPickler(stream).dump(named)
    return base64.b64encode(stream.getvalue()).decode()


def check_same_machine(url: str) -> None:
    """Raise ``EngineFailure`` if a server is on another machine, where handles are meaningless."""
    host = urlsplit(url).hostname or ""
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise EngineFailure(f"{url}: {error}") from error
    if not ipaddress.ip_address(address).is_loopback and local_address_towards(url) != address:
        raise EngineFailure(
            f"{url} is on another machine: weight_sync.transport=tensor shares memory of this one; "
            "choose disk or distributed"
        )


@contextlib.contextmanager
def _file_system_sharing() -> Iterator[None]:
    # With torch's default, sharing by file descriptor, a server fails to authenticate with the
    # trainer's resource sharer and dies.
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        mp.set_sharing_strategy(before)
