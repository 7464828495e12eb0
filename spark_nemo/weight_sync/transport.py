"""Interface of all transports from the trainer's ranks into servers, and what they share."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from spark_nemo.engines.async_utils import call_each
from spark_nemo.engines.base import Engine, EngineFailure

from .weight_stream import Export


class TransferBroken(EngineFailure):
    """Some servers failed during a push, and the remaining ones need all tensors again."""


@dataclass(slots=True)
class Targets:
    """Engines of one push. A fleet's ``WeightUpdate`` has the same ``targets`` and ``failed``."""

    targets: dict[Engine, str]
    """Each engine's name in messages."""
    errors: dict[Engine, EngineFailure] = field(default_factory=dict)

    def failed(self, engine: Engine, error: EngineFailure) -> None:
        """Record that ``engine`` did not load the weights."""
        self.errors[engine] = error

    @property
    def remaining(self) -> list[Engine]:
        """Engines that have not failed."""
        return [engine for engine in self.targets if engine not in self.errors]


class Transport(abc.ABC):
    """Sends one export to all targets. Runs on the main rank while the engines are paused."""

    needs_pause = True

    @abc.abstractmethod
    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """Bring every target to ``version``, calling ``targets.failed`` for each that fails.

        The caller drops prefix caches afterwards. Raises ``TransferBroken`` when the remaining
        targets must be sent everything again, and ``EngineFailure`` when no target received
        anything, so that all serve their previous weights.
        """

    async def confirmed(self, version: int) -> None:
        """Clean up after all remaining targets were verified to serve ``version``."""
        del version

    async def restore(self, engine: Engine, version: int) -> None:
        """Bring one server that returns between two pushes to ``version``.

        Raises ``EngineFailure`` if the transport cannot: the server then waits for the next push.
        """
        raise EngineFailure(
            f"{engine}: this transport cannot send weights version {version} to one server alone; it "
            "waits for the next sync"
        )

    async def close(self) -> None:
        """Release everything that the transport holds."""
        return


@contextlib.asynccontextmanager
async def targets_of(engine: Engine, version: int) -> AsyncIterator[Targets]:
    """Yield the engines behind ``engine``: itself, or the live replicas of a fleet.

    Afterwards a fleet evicts the replicas that failed; the failure of a single engine is raised.
    """
    if hasattr(engine, "updating"):
        async with engine.updating(version) as update:
            targets = Targets(dict(update.targets))
            yield targets
            for replica, error in targets.errors.items():
                update.failed(replica, error)
        return
    targets = Targets({engine: str(getattr(engine, "url", type(engine).__name__))})
    yield targets
    if targets.errors:
        raise targets.errors[engine]


async def each(
    targets: Targets,
    call: Callable[[Engine], Coroutine[Any, Any, object]],
    timeout_s: float,
    action: str,
) -> None:
    """Await ``call`` for all remaining targets concurrently, and record the ones that fail.

    A call that takes longer than ``timeout_s`` fails, too; ``action`` names it in messages.
    """
    failures = await call_each(targets.remaining, call, timeout_s, action)
    for engine, failure in failures.items():
        targets.failed(engine, failure)
