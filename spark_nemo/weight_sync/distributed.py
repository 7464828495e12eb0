"""Weights by broadcast: a process group of the trainer's main rank and every tensor-parallel rank
of every server.

NCCL between GPUs, gloo between CPUs. SGLang refuses an update outside begin/end_weight_update and
then never joins the broadcast; so each bucket's replies are awaited beside the broadcast, with a
time limit, and the broadcast runs in a thread that may be left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from spark_nemo.engines.base import Engine, EngineFailure, EngineUnavailable
from spark_nemo.engines.fleet.server_launcher import free_port

from .transport import Targets, TransferBroken, Transport, each
from .weight_stream import Bucket, Export

log = logging.getLogger(__name__)
_numbers = itertools.count()
_TICK_S = 0.2
_REASON_S = 5.0
"""How long a server may take to say why a collective call failed."""
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_ALIVE_S = 30.0
_LEAVE_S = 60.0


class DistributedTransport(Transport):
    """Holds the group between pushes; another set of servers, or a failure, gets a new one."""

    def __init__(self, engine_tensor_parallel: int, timeout_s: float) -> None:
        self.engine_tensor_parallel, self.timeout_s = engine_tensor_parallel, timeout_s
        self._group: _Group | None = None

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``."""
        await self._rebuild(targets)
        await each(
            targets,
            lambda engine: engine.begin_weight_update(),
            self.timeout_s,
            "begin_weight_update",
        )
        await self._refuse_losses(targets, "a weight-update session")
        backend = "cuda" if torch.cuda.is_available() else "cpu"
        buffer_B = torch.empty(export.plan.buffer_bytes, dtype=torch.uint8, device=backend)
        for bucket in export.buckets(buffer_B):
            await self._broadcast(bucket, targets, version)
            del bucket  # it may be a tensor's own memory
        await each(
            targets, lambda engine: engine.end_weight_update(), self.timeout_s, "end_weight_update"
        )
        await self._refuse_losses(targets, "the end of a weight-update session")
        assert self._group is not None
        self._group.version = version

    async def _broadcast(self, bucket: Bucket, targets: Targets, version: int) -> None:
        group = self._group
        assert group is not None

        async def receive(engine: Any) -> None:
            await engine.update_weights_from_distributed(
                names=bucket.names,
                shapes=bucket.shapes,
                dtypes=[_dtype_name(bucket.dtype)] * len(bucket.names),
                group_name=group.name,
                load_format="flattened_bucket",
                flush_cache=False,
                timeout_s=self.timeout_s,
                version=version if bucket.is_last else None,
            )

        why = await self._together(
            each(targets, receive, self.timeout_s, "receiving a bucket"),
            lambda: group.broadcast(bucket.flat_B),
            targets,
        )
        if (
            why is not None and not targets.errors
        ):  # no server said why: it may have been any of them
            for engine in targets.left:
                targets.failed(
                    engine, EngineUnavailable(f"{targets.targets[engine]}: broadcast: {why}")
                )
        await self._refuse_losses(targets, "a bucket")

    async def _together(
        self, replies: Coroutine[None, None, None], block: Callable[[], None], targets: Targets
    ) -> str | None:
        """Await the servers' replies and, in a thread, the collective call that they are about.

        None when both came; else why the call did not end. It cannot when a server has failed: then
        the thread is left behind (its own time limit ends it), and so are the other servers'
        replies.
        """
        asked, blocked = asyncio.create_task(replies), asyncio.create_task(_in_thread(block))
        waiting, end = {asked, blocked}, time.monotonic() + self.timeout_s
        while waiting and not targets.errors and time.monotonic() < end:
            _, waiting = await asyncio.wait(
                waiting, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED
            )
            if blocked.done() and blocked.exception() is not None:
                await asyncio.wait(
                    {asked}, timeout=min(_REASON_S, self.timeout_s)
                )  # a server may know why
                break
        if not waiting and not targets.errors and blocked.exception() is None:
            return None
        for task in (asked, blocked):
            task.cancel()
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        await asyncio.sleep(0)
        if blocked.done() and not blocked.cancelled() and blocked.exception() is not None:
            return str(blocked.exception())
        return f"not joined by all servers within {self.timeout_s:g} s"

    async def _refuse_losses(self, targets: Targets, what: str) -> None:
        """A server that is lost leaves the others with half a model: give the group up, who is left
        starts again.
        """
        if not targets.errors:
            return
        await self._drop_group(targets.left)
        for engine in targets.left:
            with contextlib.suppress(EngineFailure):
                await engine.end_weight_update()  # type: ignore[attr-defined]
        why = "; ".join(str(error) for error in targets.errors.values())
        raise TransferBroken(f"lost over {what}: {why}")

    async def _rebuild(self, targets: Targets) -> None:
        """A group of exactly these servers, in the processes that joined it: one that was started
        again at its address meanwhile has the version of its folder, 0.
        """
        versions: set[int] = set()

        async def ask(engine: Any) -> None:
            versions.add(await engine.weight_version())

        # Joining blocks a server until all have joined: whoever is dead already would take the
        # others with it.
        await each(targets, ask, min(_ALIVE_S, self.timeout_s), "being alive")
        await self._refuse_losses(targets, "the weight-update group")
        group = self._group
        if (
            group is not None
            and group.engines == targets.left
            and group.version != 0
            and versions == {group.version}
        ):
            return
        await self._drop_group(targets.left)
        group = _Group(targets.left, self.engine_tensor_parallel, self.timeout_s)

        async def join(engine: Any) -> None:
            await engine.init_weights_update_group(
                master_address=group.address,
                master_port=group.port,
                group_name=group.name,
                backend=group.backend,
                rank_offset=1 + targets.left.index(engine) * self.engine_tensor_parallel,
                world_size=group.world_size,
                timeout_s=self.timeout_s,
            )

        why = await self._together(
            each(targets, join, self.timeout_s, "joining the weight-update group"),
            group.join,
            targets,
        )
        if why is None:
            self._group = group
        else:  # the others wait in the rendezvous for half an hour and cannot be called back
            for engine in targets.left:
                targets.failed(
                    engine,
                    EngineUnavailable(f"{targets.targets[engine]}: weight-update group: {why}"),
                )
        await self._refuse_losses(targets, "the weight-update group")

    async def _drop_group(self, reachable: list[Engine]) -> None:
        group, self._group = self._group, None
        if group is None:
            return

        async def forget(engine: Any) -> None:
            with contextlib.suppress(EngineFailure):
                await engine.destroy_weights_update_group(group.name)

        # Ranks of one machine leave an NCCL group together: told one after the other, each would
        # wait for the next.
        there = [engine for engine in group.engines if engine in reachable]
        leaving = asyncio.create_task(
            _in_thread(lambda: group.leave(broken=len(there) < len(group.engines)))
        )
        await asyncio.gather(*map(forget, there))
        await asyncio.wait({leaving}, timeout=_LEAVE_S)

    async def close(self) -> None:
        """Tear the group down."""
        if self._group is not None:
            await self._drop_group(self._group.engines)


class _Group:
    """The trainer's end of one process group. Rank 0 here; SGLang's ranks follow in the order of
    ``engines``.
    """

    def __init__(
        self, engines: list[Engine], engine_tensor_parallel: int, timeout_s: float
    ) -> None:
        self.engines, self.timeout_s = list(engines), timeout_s
        self.world_size = 1 + len(engines) * engine_tensor_parallel
        self.version: int | None = None
        """The last that all its servers took through it."""
        # A server that outlives a killed trainer still has that one's group, and a process numbers
        # its own from 0.
        self.name = f"spark_nemo_weights_{uuid.uuid4().hex[:12]}_{next(_numbers)}"
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        addresses = [
            _own_address(str(getattr(engine, "url", "http://127.0.0.1"))) for engine in engines
        ]
        # A server beside the trainer reaches it at any of its addresses, one elsewhere not at
        # 127.0.0.1.
        self.address = next(
            (one for one in addresses if not ipaddress.ip_address(one).is_loopback),
            addresses[0] if addresses else "127.0.0.1",
        )
        self.port = free_port(self.address)
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Blocks until all ranks are there. The rendezvous is SGLang's
        ``init_custom_process_group``, which is built on torch's private helper: ``new_group`` knows
        the default group's ranks only.
        """
        from torch.distributed import distributed_c10d as c10d

        timeout = timedelta(seconds=self.timeout_s)
        url = (
            f"tcp://[{self.address}]:{self.port}"
            if ":" in self.address
            else f"tcp://{self.address}:{self.port}"
        )
        store, rank, world_size = next(c10d.rendezvous(url, 0, self.world_size, timeout=timeout))
        store.set_timeout(timeout)
        with _errors_are_ours():
            group, _ = c10d._new_process_group_helper(
                world_size,
                rank,
                [],
                c10d.Backend(self.backend),
                c10d.PrefixStore(self.name, store),
                group_name=self.name,
                timeout=timeout,
            )
        c10d._world.pg_group_ranks[group] = {index: index for index in range(world_size)}
        self._group = group

    def broadcast(self, flat_B: torch.Tensor) -> None:
        """Send from here to all; blocks."""
        dist.broadcast(flat_B, src=0, group=self._group)
        if flat_B.is_cuda:
            torch.cuda.synchronize(flat_B.device)

    def leave(self, broken: bool = False) -> None:
        """Forget the group; blocks. ``broken``: peers are gone, and torch's destroy would wait for
        what they have not joined, while its abort ends that.
        """
        if self._group is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                if broken:
                    dist.distributed_c10d._abort_process_group(self._group)
                else:
                    dist.destroy_process_group(self._group)
            self._group = None


@contextlib.contextmanager
def _errors_are_ours() -> Iterator[None]:
    """A group made in here does not end this process when a collective of it fails or is late, as
    torch's watchdog does by default (ProcessGroupNCCL reads this once, when it is made): one dead
    server would end the trainer.
    """
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ERROR_HANDLING]
        else:
            os.environ[_ERROR_HANDLING] = before


def same_nccl_as_sglang() -> None:
    """Before this process first uses NCCL: SGLang's processes set NCCL_CUMEM_ENABLE=0 where nothing
    else is set (entrypoints/engine.py, 0.5.21), NCCL's own default is another, and ranks that
    differ fail to connect.
    """
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")


async def _in_thread(call: Callable[[], None]) -> None:
    """Not ``asyncio.to_thread``: a thread that never ends must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        try:
            call()
            error = None
        except (RuntimeError, ValueError, OSError) as caught:
            error = EngineFailure(f"{type(caught).__name__}: {caught}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="weight sync", daemon=True).start()
    await done


def _own_address(url: str) -> str:
    """This machine's address on the way to ``url``."""
    found = socket.getaddrinfo(urlsplit(url).hostname or "127.0.0.1", 9, type=socket.SOCK_DGRAM)
    family, _, _, _, where = min(found, key=lambda each: each[0] != socket.AF_INET)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # a datagram socket sends nothing to connect
        return probe.getsockname()[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
