"""One push of new weights: pause, send by the configured transport, drop cached prefixes, compare
checksums, resume.

The main rank talks to the engines and tells the others what to take part in, so that it can wait
first, and repeat.
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

ATTEMPTS = 3
"""Exports in one push: servers that are lost half-way cost the others a second one."""
RETURNS = 3
"""So often one version waits for a pool that was lost whole. One that dies of every push may die of
what is pushed.
"""
_NAMED = 5
"""Tensors that an error names."""


class _Next(Enum):
    """What the main rank tells the others while a push lasts; its last word is the outcome."""

    EXPORT = "export"


class WeightSync:
    """The trainer's end of every sync of a run. Every rank has one; all its methods but ``restore``
    are collective.
    """

    def __init__(
        self, settings: WeightSyncConfig, plan: SyncPlan, transport: Transport, tied: bool
    ) -> None:
        self.settings, self.plan, self.transport, self._tied = settings, plan, transport, tied
        self.memory_peak = 0
        """Bytes that the largest push so far held on this rank beyond the model."""
        self._sent: tuple[int, Checksums] | None = None
        self._told = False

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
        """The sync of ``worker`` with engines of ``engine_kind``; ``folder`` is the run's, for what
        goes through disk.

        Raises ``ConfigError`` when model, layouts and settings do not go together.
        """
        settings.check_engine(engine_kind)
        if engine_kind not in ("local", "sglang"):
            raise ConfigError(
                f"engine.kind={engine_kind} takes no new weights: choose sglang or local for stage III"
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
                where = Path(settings.folder) if settings.folder else folder / "weights"
                transport: Transport = DiskTransport(
                    where, worker.hf_config, source_dir, settings.timeout_s
                )
            case "distributed":
                transport = DistributedTransport(engine_tensor_parallel, settings.timeout_s)
            case "tensor":
                transport = TensorTransport(engine_tensor_parallel, settings.timeout_s)
            case _:
                transport = InProcessTransport()
        return cls(settings, plan, transport, worker.spec.tied_embeddings)

    async def push(self, worker: MegatronWorker, engine: Engine | None, version: int) -> None:
        """Give ``engine`` (one, or a fleet; on the main rank) the worker's weights as ``version``.

        Requests in flight are paused meanwhile and go on afterwards; every token is stamped with
        the version that sampled it. A fleet that lost all its servers, before the push or in it, is
        waited for as its requests wait. Raises ``EngineFailure`` on every rank when no engine took
        the weights, or when an engine serves something else than was sent, naming the tensors.
        """
        if worker.is_main and engine is None:
            raise ValueError("a push on the main rank needs the engine")
        if engine is not None and worker.is_main:
            said = broadcast_object(await self._push_from_main(worker, engine, version))
        else:
            while isinstance(said := broadcast_object(None), _Next):
                Export(worker, self.plan).drain()
        if said is not None:
            raise EngineFailure(f"weights version {version}: {said}")

    async def _push_from_main(
        self, worker: MegatronWorker, engine: Engine, version: int
    ) -> str | None:
        """What went wrong, None when all went well."""
        returns = (
            RETURNS if isinstance(engine, Fleet) else 0
        )  # of what stands alone nobody would notice the return
        try:
            while True:
                if isinstance(engine, Fleet):
                    await engine.wait_updatable()
                try:
                    await self._push_once(worker, engine, version)
                    return None
                except EngineUnavailable:
                    if returns == 0:
                        raise
                    returns -= 1
        except (EngineFailure, OSError, ValueError, MemoryError) as error:
            return str(error)

    async def _push_once(self, worker: MegatronWorker, engine: Engine, version: int) -> None:
        """Raises ``EngineUnavailable`` when every target was lost: who returns needs another push."""
        rounds, again = 0, True
        async with (
            _paused(engine, self.transport.needs_pause),
            targets_of(engine, version) as targets,
        ):
            while again:
                rounds += 1
                again = await self._round(
                    worker, engine, targets, version, may_repeat=rounds < ATTEMPTS
                )

    async def _round(
        self,
        worker: MegatronWorker,
        engine: Engine,
        targets: Targets,
        version: int,
        may_repeat: bool,
    ) -> bool:
        """One export to the targets that are left. Is another needed? Raises when nothing reached
        anybody.
        """
        expected = None if self.settings.checksums == "off" else self._expected(engine, worker)
        left = Targets({one: targets.targets[one] for one in targets.left})
        again, error = False, None
        broadcast_object(_Next.EXPORT)
        export = Export(worker, self.plan, expected)
        try:
            await self.transport.send(export, left, version)
            await self._finish(export, left, version)
        except TransferBroken as broken:
            again = may_repeat and bool(left.left)
            log.warning(
                "weights version %d: %s%s",
                version,
                broken,
                "; sending again to the others" if again else "",
            )
            for one in left.left if not again else ():
                left.failed(one, EngineUnavailable(f"has half a model: {broken}"))
        except (EngineFailure, OSError, ValueError, MemoryError) as caught:
            error = caught
        targets.errors |= left.errors
        export.drain()  # what a failed round left over: the export is collective to its end
        self.memory_peak = max(self.memory_peak, export.memory.peak)
        if error is not None:
            raise error
        return again

    async def _finish(self, export: Export, targets: Targets, version: int) -> None:
        """Drop cached prefixes, compare checksums, tidy up."""
        if self.transport.needs_pause:
            await each(
                targets, lambda one: one.flush_cache(), self.settings.timeout_s, "flush_cache"
            )
        sent = export.expected.result() if export.expected is not None else None
        if sent is not None:
            await each(
                targets,
                lambda one: self._verify(one, sent),
                self.settings.timeout_s,
                "weights_checksum",
            )
        if targets.left:
            self._sent = (version, sent) if sent is not None else None
            await self.transport.confirmed(version)

    def _expected(self, engine: Engine | None, worker: MegatronWorker) -> ExpectedChecksums:
        served_form = getattr(engine, "served_form", None)
        if served_form is None:
            return ExpectedChecksums(self.plan.engine_ranks, worker.dtype)
        return ExpectedChecksums(
            by_checkpoint_name(self.plan, self._tied), worker.dtype, served_form
        )

    async def _verify(self, engine: Engine, sent: Checksums) -> None:
        """Raise ``EngineFailure`` naming the tensors that ``engine`` serves differently."""
        try:
            served = await engine.weights_checksum()
        except EngineUnavailable:
            raise  # it cannot tell because it died
        except EngineFailure as error:
            if self.settings.checksums == "require":
                raise EngineFailure(
                    f"weight_sync.checksums=require, and the engine gives none: {error}"
                ) from error
            if not self._told:
                log.warning(
                    "weights are not compared by checksum, the engine gives none (%s): only the first-step "
                    "gate guards them",
                    error,
                )
            self._told = True
            return
        if wrong := differing(sent, served):
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise EngineFailure(
                f"{len(wrong)} of {sum(map(len, sent))} tensors are served differently from what was "
                f"sent: {', '.join(wrong[:_NAMED])}{more}"
            )

    async def restore(self, engine: Engine, version: int) -> None:
        """Bring one server that returns in the middle of a step to the weights it missed, and check
        them.

        For a fleet's ``on_return``. Raises ``EngineFailure`` when it has to wait for the next push.
        Main rank only.
        """
        await self.transport.restore(engine, version)
        await engine.flush_cache()  # type: ignore[attr-defined]
        if self._sent is not None and self._sent[0] == version:
            await self._verify(engine, self._sent[1])

    async def differing_tensors(
        self, worker: MegatronWorker, engine: Engine | None
    ) -> list[str] | None:
        """Names of the tensors that ``engine`` (of a fleet: any replica) serves differently from
        what the trainer has.

        None if no engine can tell. Collective.
        """
        expected = self._expected(engine, worker) if worker.is_main else None
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
        """Leave process groups and remove what lies on disk. Main rank only."""
        await self.transport.close()


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
