"""Push new weights: pause, send, drop cached prefixes, compare checksums, resume.

The main rank talks to the engines and tells the other ranks when to take part in an export, because
only the main rank knows whether servers are ready and whether an export must be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path

from spark_nemo.config import ConfigError, WeightSyncConfig
from spark_nemo.engines.base import Engine, EngineFailure, EngineUnavailable
from spark_nemo.engines.fleet import Fleet
from spark_nemo.megatron.hf_files import dtype_name
from spark_nemo.megatron.process_groups import broadcast_object
from spark_nemo.megatron.worker import MegatronWorker

from .checksum import Checksums, ExpectedChecksums, by_checkpoint_name, differing
from .disk import DiskTransport
from .distributed import DistributedTransport
from .in_process import InProcessTransport
from .shared_memory import TensorTransport
from .sync_plan import SyncPlan, plan_sync
from .transport import Targets, TransferBroken, Transport, each, targets_of
from .weight_stream import Export

log = logging.getLogger(__name__)

MAX_EXPORTS = 3
"""Exports in one push. A server that fails during a broadcast costs the others another one."""
MAX_POOL_RETRIES = 3
"""Retries of one version after the whole pool went down.

A pool that dies on every push is probably being killed by the weights.
"""
_NAMED_TENSORS = 5
"""Tensors that an error names."""


class _Command(Enum):
    """Command of the main rank to the others; any other broadcast value ends the push."""

    EXPORT = "export"


class WeightSync:
    """The trainer's end of every sync of a run.

    Every rank has one. All methods but ``restore`` and ``close`` are collective.
    """

    def __init__(
        self, settings: WeightSyncConfig, plan: SyncPlan, transport: Transport, tied: bool
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.transport = transport
        self.memory_peak = 0
        """Bytes that the largest push held on this rank in addition to the model."""
        self._tied = tied
        self._sent: tuple[int, Checksums] | None = None
        """The last version that was verified, for servers that return later."""
        self._warned_no_checksums = False

    @classmethod
    def build(
        cls,
        settings: WeightSyncConfig,
        worker: MegatronWorker,
        *,
        engine_kind: str,
        folder: Path,
        source_dir: Path | None = None,
        engine_tensor_parallel: int = 1,
    ) -> WeightSync:
        """Return the sync of ``worker`` with engines of ``engine_kind``.

        ``folder`` is the run's, for the disk transport. Raises ``ConfigError`` when model, layouts
        and settings do not fit together.
        """
        settings.check_engine(engine_kind)
        if engine_kind not in ("local", "sglang"):
            raise ConfigError(
                f"engine.kind={engine_kind}: weights cannot be updated during a run; choose sglang or "
                "local for stage III"
            )
        plan = plan_sync(
            worker.spec,
            dtype_name(worker.dtype),
            tensor_parallel=worker.layout.tensor_parallel,
            engine_tensor_parallel=engine_tensor_parallel,
            bucket_bytes=settings.bucket_bytes,
        )
        match settings.transport_for(engine_kind):
            case "disk":
                version_root = Path(settings.folder) if settings.folder else folder / "weights"
                transport: Transport = DiskTransport(
                    version_root, worker.hf_config, source_dir, settings.timeout_s
                )
            case "distributed":
                transport = DistributedTransport(engine_tensor_parallel, settings.timeout_s)
            case "tensor":
                transport = TensorTransport(engine_tensor_parallel, settings.timeout_s)
            case _:
                transport = InProcessTransport()
        return cls(settings, plan, transport, worker.spec.tied_embeddings)

    async def push(self, worker: MegatronWorker, engine: Engine | None, version: int) -> None:
        """Bring ``engine`` (a single engine or a fleet; on the main rank) to ``version``.

        Requests in flight are paused and go on afterwards; every token is stamped with the version
        that sampled it. A fleet without a healthy server, before or during the push, is waited for.
        Raises ``EngineFailure`` on every rank when no engine loaded the weights, or when an engine
        serves other weights than were sent, naming the tensors.
        """
        if worker.is_main:
            if engine is None:
                raise ValueError("a push on the main rank needs the engine")
            error = broadcast_object(await self._push_from_main(worker, engine, version))
        else:
            error = self._follow_main(worker)
        if error is not None:
            raise EngineFailure(f"weights version {version}: {error}")

    def _follow_main(self, worker: MegatronWorker) -> str | None:
        """Take part in every export that the main rank begins; return the push's error."""
        while True:
            command = broadcast_object(None)
            if not isinstance(command, _Command):
                return command
            Export(worker, self.plan).drain()

    async def _push_from_main(
        self, worker: MegatronWorker, engine: Engine, version: int
    ) -> str | None:
        """Return what went wrong, None if nothing did."""
        # A single engine has no health monitor that would notice its return.
        retries = MAX_POOL_RETRIES if isinstance(engine, Fleet) else 0
        try:
            while True:
                if isinstance(engine, Fleet):
                    # Before the pause: a paused fleet does not count time, so this would never end.
                    await engine.wait_updatable()
                try:
                    await self._push_once(worker, engine, version)
                    return None
                except EngineUnavailable:
                    if retries == 0:
                        raise
                    retries -= 1
        except (EngineFailure, OSError, ValueError, MemoryError) as error:
            # Returned, not raised: the other ranks wait for the outcome.
            return str(error)

    async def _push_once(self, worker: MegatronWorker, engine: Engine, version: int) -> None:
        """Push to the servers that are up. Raises ``EngineUnavailable`` when all of them failed."""
        async with (
            _paused(engine, self.transport.needs_pause),
            targets_of(engine, version) as targets,
        ):
            for number in range(1, MAX_EXPORTS + 1):
                is_last = number == MAX_EXPORTS
                if not await self._export_once(worker, engine, targets, version, is_last):
                    return

    async def _export_once(
        self,
        worker: MegatronWorker,
        engine: Engine,
        targets: Targets,
        version: int,
        is_last: bool,
    ) -> bool:
        """Send one export to the remaining targets. Returns True if another one is needed.

        Raises when no target received anything.
        """
        expected = None
        if self.settings.checksums != "off":
            expected = self._expected_checksums(engine, worker)
        remaining = Targets({target: targets.targets[target] for target in targets.remaining})
        retry = False
        error: Exception | None = None
        broadcast_object(_Command.EXPORT)
        export = Export(worker, self.plan, expected)
        try:
            await self.transport.send(export, remaining, version)
            await self._finish(export, remaining, version)
        except TransferBroken as broken:
            retry = not is_last and bool(remaining.remaining)
            log.warning(
                "weights version %d: %s%s",
                version,
                broken,
                "; sending again to the other servers" if retry else "",
            )
            if not retry:
                for target in remaining.remaining:
                    remaining.failed(target, EngineUnavailable(f"has half a model: {broken}"))
        except (EngineFailure, OSError, ValueError, MemoryError) as caught:
            error = caught
        targets.errors |= remaining.errors
        # The export is collective: after an error the other ranks are still inside it.
        export.drain()
        self.memory_peak = max(self.memory_peak, export.memory.peak)
        if error is not None:
            raise error
        return retry

    async def _finish(self, export: Export, targets: Targets, version: int) -> None:
        """Drop cached prefixes, compare checksums and let the transport clean up."""
        if self.transport.needs_pause:
            # Cached keys and values were computed with the old weights.
            await each(
                targets, lambda engine: engine.flush_cache(), self.settings.timeout_s, "flush_cache"
            )
        sent = export.expected.result() if export.expected is not None else None
        if sent is not None:
            await each(
                targets,
                lambda engine: self._verify(engine, sent),
                self.settings.timeout_s,
                "weights_checksum",
            )
        if targets.remaining:
            self._sent = (version, sent) if sent is not None else None
            await self.transport.confirmed(version)

    def _expected_checksums(
        self, engine: Engine | None, worker: MegatronWorker
    ) -> ExpectedChecksums:
        served_form = getattr(engine, "served_form", None)
        if served_form is None:
            return ExpectedChecksums(self.plan.engine_ranks, worker.dtype)
        by_name = by_checkpoint_name(self.plan, self._tied)
        return ExpectedChecksums(by_name, worker.dtype, served_form)

    async def _verify(self, engine: Engine, sent: Checksums) -> None:
        """Raise ``EngineFailure`` naming the tensors that ``engine`` serves differently."""
        try:
            served = await engine.weights_checksum()
        except EngineUnavailable:
            raise  # the server died; it may well support checksums
        except EngineFailure as error:
            if self.settings.checksums == "require":
                raise EngineFailure(
                    f"weight_sync.checksums=require, and the engine cannot report checksums: {error}"
                ) from error
            if not self._warned_no_checksums:
                log.warning(
                    "weights are not compared: the engine cannot report checksums (%s), so only the "
                    "first-step gate checks them",
                    error,
                )
            self._warned_no_checksums = True
            return
        wrong = differing(sent, served)
        if wrong:
            total = sum(len(rank) for rank in sent)
            raise EngineFailure(
                f"{len(wrong)} of {total} tensors are served differently from what was sent: "
                f"{_first_names(wrong)}"
            )

    async def restore(self, engine: Engine, version: int) -> None:
        """Bring a server that returns between two pushes to the weights it missed; verify them.

        The ``on_return`` callback of a fleet, on the main rank only. Raises ``EngineFailure`` when
        the server has to wait for the next push.
        """
        await self.transport.restore(engine, version)
        await engine.flush_cache()  # type: ignore[attr-defined]
        if self._sent is not None and self._sent[0] == version:
            await self._verify(engine, self._sent[1])

    async def differing_tensors(
        self, worker: MegatronWorker, engine: Engine | None
    ) -> list[str] | None:
        """Return the tensors that ``engine``, or any replica of a fleet, serves differently.

        None if no engine can report checksums. Collective.
        """
        expected = self._expected_checksums(engine, worker) if worker.is_main else None
        export = Export(worker, self.plan, expected)
        wrong: list[str] | None = None
        if expected is not None:
            for _ in export:
                pass
            trained = expected.result()
            replicas = list(engine.replicas().values()) if isinstance(engine, Fleet) else [engine]
            for replica in replicas:
                try:
                    served = await replica.weights_checksum()
                except EngineFailure:
                    continue
                wrong = [*(wrong or []), *differing(trained, served)]
        export.drain()
        return broadcast_object(wrong)

    async def close(self) -> None:
        """Leave process groups and remove weight files. Main rank only."""
        await self.transport.close()


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_TENSORS} more" if len(names) > _NAMED_TENSORS else ""
    return ", ".join(names[:_NAMED_TENSORS]) + more


@asynccontextmanager
async def _paused(engine: Engine, needed: bool) -> AsyncIterator[None]:
    if not needed:
        yield
        return
    await engine.pause()
    try:
        yield
    finally:
        await engine.resume()
