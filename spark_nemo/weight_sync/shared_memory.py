"""Weights by handle: servers on the main rank's machine map the memory in which a bucket lies
(SGLang's tensor path).

The memory is a file of /dev/shm, also when the model lies on a GPU: a copy down and one up, and no
CUDA IPC. With torch's default sharing, by file descriptor, the server fails to authenticate with
the trainer's resource sharer and dies.
"""

from __future__ import annotations

import base64
import contextlib
import io
import ipaddress
import logging
import socket
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from urllib.parse import urlsplit

import torch
import torch.multiprocessing as mp

from spark_nemo.engines.base import EngineFailure

from .distributed import _own_address
from .transport import Targets, TransferBroken, Transport, each
from .weight_stream import Bucket, Export

log = logging.getLogger(__name__)


class TensorTransport(Transport):
    """``update_weights_from_tensor``: the payload is a handle, one per tensor-parallel rank of the
    server.
    """

    def __init__(self, engine_tensor_parallel: int, timeout_s: float) -> None:
        self.engine_tensor_parallel, self.timeout_s = engine_tensor_parallel, timeout_s

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``."""
        for engine in targets.left:
            refuse_other_machine(str(getattr(engine, "url", "http://127.0.0.1")))
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
            for bucket in export.buckets(buffer_B):
                await self._load(bucket, targets, version)
                if not targets.left:
                    break
        await each(
            targets, lambda engine: engine.end_weight_update(), self.timeout_s, "end_weight_update"
        )
        if not targets.left:
            raise TransferBroken("; ".join(str(error) for error in targets.errors.values()))

    async def _load(self, bucket: Bucket, targets: Targets, version: int) -> None:
        # A payload each: opening one gives back the reference that pickling it took, and the last
        # reference the memory.
        await each(
            targets,
            lambda engine: engine.update_weights_from_tensor(
                [serialise(bucket.tensors()) for _ in range(self.engine_tensor_parallel)],
                flush_cache=False,
                timeout_s=self.timeout_s,
                version=version if bucket.is_last else None,
            ),
            self.timeout_s,
            "loading a bucket",
        )


def serialise(named: list[tuple[str, torch.Tensor]]) -> str:
    """Handles of ``named`` as SGLang's ``MultiprocessingSerializer`` reads them: a base64 pickle of
    the list.
    """
    stream = io.BytesIO()
    ForkingPickler(stream).dump(named)
    return base64.b64encode(stream.getvalue()).decode()


def refuse_other_machine(url: str) -> None:
    """Raise ``EngineFailure`` when a server is not on this machine: a handle means nothing
    elsewhere.
    """
    host = urlsplit(url).hostname or ""
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise EngineFailure(f"{url}: {error}") from error
    if not ipaddress.ip_address(address).is_loopback and _own_address(url) != address:
        raise EngineFailure(
            f"{url} is on another machine: weight_sync.transport=tensor shares memory of this one; "
            "choose disk or distributed"
        )


@contextlib.contextmanager
def _file_system_sharing() -> Iterator[None]:
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        mp.set_sharing_strategy(before)
