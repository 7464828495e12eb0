"""Weights by broadcast from the trainer's main rank to every tensor-parallel rank of every server.

NCCL between GPUs, gloo between CPUs. A server that rejects an update never joins the broadcast. So
the servers' replies are awaited together with the broadcast, with a time limit, and the broadcast
runs in a thread that can be abandoned.
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
from spark_nemo.megatron.hf_files import dtype_name

from .transport import Targets, TransferBroken, Transport, each
from .weight_stream import Bucket, Export

log = logging.getLogger(__name__)

_group_numbers = itertools.count()
_POLL_S = 0.2
_REASON_TIMEOUT_S = 5.0
"""Time for a server to report why a collective call failed."""
_ALIVE_TIMEOUT_S = 30.0
_LEAVE_TIMEOUT_S = 60.0
_NCCL_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class DistributedTransport(Transport):
    """Keeps the process group between pushes; a failure or another set of servers gets a new one."""

    def __init__(self, engine_tensor_parallel: int, timeout_s: float) -> None:
        self.engine_tensor_parallel = engine_tensor_parallel
        self.timeout_s = timeout_s
        self._group: WeightUpdateGroup | None = None

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``."""
        await self._ensure_group(targets)
        # SGLang rejects weights outside begin/end_weight_update.
        await each(
            targets,
            lambda engine: engine.begin_weight_update(),
            self.timeout_s,
            "begin_weight_update",
        )
        await self._raise_if_any_failed(targets, "a weight-update session")
        buffer_device = "cuda" if torch.cuda.is_available() else "cpu"
        buffer_B = torch.empty(export.plan.buffer_bytes, dtype=torch.uint8, device=buffer_device)
        for bucket in export.buckets(buffer_B):
            await self._broadcast(bucket, targets, version)
            del bucket  # it may hold a large tensor's own memory while the next one is gathered
        await each(
            targets, lambda engine: engine.end_weight_update(), self.timeout_s, "end_weight_update"
        )
        await self._raise_if_any_failed(targets, "the end of a weight-update session")
        assert self._group is not None
        self._group.version = version

    async def _broadcast(self, bucket: Bucket, targets: Targets, version: int) -> None:
        group = self._group
        assert group is not None

        async def receive(engine: Any) -> None:
            await engine.update_weights_from_distributed(
                names=bucket.names,
                shapes=bucket.shapes,
                dtypes=[dtype_name(bucket.dtype)] * len(bucket.names),
                group_name=group.name,
                load_format="flattened_bucket",
                flush_cache=False,
                timeout_s=self.timeout_s,
                # A server has the new version once it has the last bucket.
                version=version if bucket.is_last else None,
            )

        failure = await self._await_both(
            each(targets, receive, self.timeout_s, "receiving a bucket"),
            lambda: group.broadcast(bucket.flat_B),
            targets,
        )
        if failure is not None and not targets.errors:
            # No server reported an error, so any of them may have caused it.
            self._fail_remaining(targets, f"broadcast: {failure}")
        await self._raise_if_any_failed(targets, "a bucket")

    async def _await_both(
        self, replies: Coroutine[None, None, None], block: Callable[[], None], targets: Targets
    ) -> str | None:
        """Await the servers' replies and, in a thread, the collective call ``block``.

        Returns None when both succeeded, else why the collective call did not end.
        """
        reply_task = asyncio.create_task(replies)
        block_task = asyncio.create_task(_run_in_daemon_thread(block))
        waiting = {reply_task, block_task}
        deadline = time.monotonic() + self.timeout_s
        # After one server's failure the collective call can never end: stop at once, not at the
        # deadline.
        while waiting and not targets.errors and time.monotonic() < deadline:
            _, waiting = await asyncio.wait(
                waiting, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
            )
            if block_task.done() and block_task.exception() is not None:
                # The reply of the server that failed names the cause better than the broadcast does.
                await asyncio.wait({reply_task}, timeout=min(_REASON_TIMEOUT_S, self.timeout_s))
                break
        if not waiting and not targets.errors and block_task.exception() is None:
            return None
        # Cancelling abandons the thread (its own timeout ends it) and the other servers' replies.
        for task in (reply_task, block_task):
            task.cancel()
            task.add_done_callback(_retrieve_exception)
        await asyncio.sleep(0)  # let the cancellations take effect
        if block_task.done() and not block_task.cancelled() and block_task.exception() is not None:
            return str(block_task.exception())
        return f"not joined by all servers within {self.timeout_s:g} s"

    @staticmethod
    def _fail_remaining(targets: Targets, reason: str) -> None:
        for engine in targets.remaining:
            targets.failed(engine, EngineUnavailable(f"{targets.targets[engine]}: {reason}"))

    async def _raise_if_any_failed(self, targets: Targets, step: str) -> None:
        """Raise ``TransferBroken`` if a server failed during ``step``.

        The others then have half a model: the group is dropped and their update session ended, so
        that the caller can send everything again.
        """
        if not targets.errors:
            return
        await self._drop_group(targets.remaining)
        for engine in targets.remaining:
            with contextlib.suppress(EngineFailure):
                await engine.end_weight_update()  # type: ignore[attr-defined]
        reasons = "; ".join(str(error) for error in targets.errors.values())
        raise TransferBroken(f"servers failed during {step}: {reasons}")

    async def _ensure_group(self, targets: Targets) -> None:
        """Reuse the group if exactly these server processes joined it, else build a new one."""
        versions: set[int] = set()

        async def read_version(engine: Any) -> None:
            versions.add(await engine.weight_version())

        # Joining blocks a server until all have joined: a server that is dead already would block
        # the others, too.
        await each(
            targets, read_version, min(_ALIVE_TIMEOUT_S, self.timeout_s), "reporting its version"
        )
        await self._raise_if_any_failed(targets, "the check before the weight-update group")
        group = self._group
        # A server that was restarted at its address has the version of its folder, 0, and did not
        # join the group.
        same_processes = group is not None and group.version != 0 and versions == {group.version}
        if group is not None and same_processes and group.engines == targets.remaining:
            return
        await self._drop_group(targets.remaining)
        group = WeightUpdateGroup(targets.remaining, self.engine_tensor_parallel, self.timeout_s)

        async def join(engine: Any) -> None:
            await engine.init_weights_update_group(
                master_address=group.address,
                master_port=group.port,
                group_name=group.name,
                backend=group.backend,
                rank_offset=1 + group.engines.index(engine) * self.engine_tensor_parallel,
                world_size=group.world_size,
                timeout_s=self.timeout_s,
            )

        failure = await self._await_both(
            each(targets, join, self.timeout_s, "joining the weight-update group"),
            group.join,
            targets,
        )
        if failure is None:
            self._group = group
        else:
            # The other servers wait in the rendezvous for half an hour and cannot be called back.
            self._fail_remaining(targets, f"weight-update group: {failure}")
        await self._raise_if_any_failed(targets, "the weight-update group")

    async def _drop_group(self, reachable: list[Engine]) -> None:
        group = self._group
        self._group = None
        if group is None:
            return

        async def leave(engine: Any) -> None:
            with contextlib.suppress(EngineFailure):
                await engine.destroy_weights_update_group(group.name)

        # Ranks of one machine leave an NCCL group together: called one after the other, each would
        # wait for the next.
        leaving_engines = [engine for engine in group.engines if engine in reachable]
        broken = len(leaving_engines) < len(group.engines)
        own_leave = asyncio.create_task(_run_in_daemon_thread(lambda: group.leave(broken=broken)))
        await asyncio.gather(*map(leave, leaving_engines))
        await asyncio.wait({own_leave}, timeout=_LEAVE_TIMEOUT_S)

    async def close(self) -> None:
        """Leave the process group."""
        if self._group is not None:
            await self._drop_group(self._group.engines)


class WeightUpdateGroup:
    """The trainer's end of a process group: rank 0. SGLang's ranks follow in ``engines`` order."""

    def __init__(
        self, engines: list[Engine], engine_tensor_parallel: int, timeout_s: float
    ) -> None:
        self.engines = list(engines)
        self.timeout_s = timeout_s
        self.world_size = 1 + len(engines) * engine_tensor_parallel
        self.version: int | None = None
        """The last version that all servers received through this group."""
        # A server that outlives a killed trainer still has that trainer's group, and every process
        # numbers its groups from 0.
        self.name = f"spark_nemo_weights_{uuid.uuid4().hex[:12]}_{next(_group_numbers)}"
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.address = _rendezvous_address(engines)
        self.port = free_port(self.address)
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Block until all ranks have joined.

        The rendezvous is that of SGLang's ``init_custom_process_group``. It needs torch's private
        helper, because ``new_group`` knows the ranks of the default group only.
        """
        from torch.distributed import distributed_c10d as c10d

        timeout = timedelta(seconds=self.timeout_s)
        host = f"[{self.address}]" if ":" in self.address else self.address
        rendezvous = c10d.rendezvous(
            f"tcp://{host}:{self.port}", 0, self.world_size, timeout=timeout
        )
        store, rank, world_size = next(rendezvous)
        store.set_timeout(timeout)
        with _nccl_errors_do_not_abort():
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
        """Send ``flat_B`` to all ranks; blocks until it is sent."""
        dist.broadcast(flat_B, src=0, group=self._group)
        if flat_B.is_cuda:
            # NCCL only queued it, and the next bucket overwrites the buffer.
            torch.cuda.synchronize(flat_B.device)

    def leave(self, broken: bool = False) -> None:
        """Destroy the group; blocks. ``broken``: some peers are gone."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                if broken:
                    # destroy would wait for calls that the peers never joined; abort ends them.
                    dist.distributed_c10d._abort_process_group(self._group)
                else:
                    dist.destroy_process_group(self._group)
            self._group = None


def _rendezvous_address(engines: list[Engine]) -> str:
    """Return an address of this machine that every server can reach."""
    urls = [str(getattr(engine, "url", "http://127.0.0.1")) for engine in engines]
    addresses = [local_address_towards(url) for url in urls]
    # Servers of this machine reach it at any address, servers of others not at 127.0.0.1.
    for address in addresses:
        if not ipaddress.ip_address(address).is_loopback:
            return address
    return addresses[0] if addresses else "127.0.0.1"


@contextlib.contextmanager
def _nccl_errors_do_not_abort() -> Iterator[None]:
    """Keep torch's watchdog from ending this process when a call of a group made inside fails.

    By default one dead server would end the trainer. ProcessGroupNCCL reads the variable once, when
    the group is made.
    """
    before = os.environ.get(_NCCL_ERROR_HANDLING)
    os.environ[_NCCL_ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NCCL_ERROR_HANDLING]
        else:
            os.environ[_NCCL_ERROR_HANDLING] = before


def use_sglang_nccl_settings() -> None:
    """Set NCCL_CUMEM_ENABLE as SGLang does; call it before this process first uses NCCL.

    SGLang's processes set it to 0 unless it is set (entrypoints/engine.py, 0.5.21). NCCL's default
    differs, and ranks with different values fail to connect.
    """
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")


async def _run_in_daemon_thread(call: Callable[[], None]) -> None:
    """Await a blocking call. Raises ``EngineFailure`` if it fails.

    ``asyncio.to_thread`` would keep the process from exiting while the call blocks.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: Exception | None) -> None:
        if done.done():  # cancelled
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: Exception | None = None
        try:
            call()
        except (RuntimeError, ValueError, OSError) as caught:
            error = EngineFailure(f"{type(caught).__name__}: {caught}")
        # RuntimeError: the loop was closed, so no task waits for the result any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="weight sync", daemon=True).start()
    await done


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """Read a task's exception, so that asyncio does not log it as never retrieved."""
    if not task.cancelled():
        task.exception()


def local_address_towards(url: str) -> str:
    """Return this machine's address on the route to ``url``."""
    host = urlsplit(url).hostname or "127.0.0.1"
    found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    ipv4_first = sorted(found, key=lambda info: info[0] != socket.AF_INET)
    family, _, _, _, address = ipv4_first[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: the socket is for datagrams
        return probe.getsockname()[0]
