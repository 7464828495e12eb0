"""The one interface of all ways from the trainer's ranks into servers, and what they share."""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from spark_nemo.engines.base import Engine, EngineFailure, EngineUnavailable

from .weight_stream import Export


class TransferBroken(EngineFailure):
    """A push in which some servers were lost half-way; those that are left need all of it again."""


@dataclass(slots=True)
class Targets:
    """The engines that one push is for. A fleet's ``WeightUpdate`` has the same two members."""

    targets: dict[Engine, str]
    """Engine -> its name in messages."""
    errors: dict[Engine, EngineFailure] = field(default_factory=dict)

    def failed(self, engine: Engine, error: EngineFailure) -> None:
        """``engine`` did not take the weights."""
        self.errors[engine] = error

    @property
    def left(self) -> list[Engine]:
        """Who has not failed yet."""
        return [engine for engine in self.targets if engine not in self.errors]


class Transport(abc.ABC):
    """Sends one export to all targets. Runs on the main rank; the engines are paused meanwhile."""

    needs_pause = True

    @abc.abstractmethod
    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """Bring every target to ``version``, saying ``targets.failed`` for each that did not take
        it.

        The caller drops prefix caches afterwards. Raises ``TransferBroken`` when the remaining
        targets must be sent everything again, and ``EngineFailure`` when no target got anything:
        all serve what they served before.
        """

    async def confirmed(self, version: int) -> None:
        """All targets that are left serve ``version`` and have been checked."""
        del version

    async def restore(self, engine: Engine, version: int) -> None:
        """Bring one server that returns in the middle of a step to ``version``. Raises
        ``EngineFailure`` if impossible: the server then waits for the next sync.
        """
        raise EngineFailure(
            f"{engine}: this transport cannot send weights version {version} to one server alone; it "
            "waits for the next sync"
        )

    async def close(self) -> None:
        """Leave nothing behind."""
        return


@contextlib.asynccontextmanager
async def targets_of(engine: Engine, version: int) -> AsyncIterator[Targets]:
    """The engines behind ``engine``: itself, or a fleet's living members. At the end, a failure of
    all is raised.

    Of a fleet, who fails is taken out by the fleet itself.
    """
    if hasattr(engine, "updating"):
        async with engine.updating(version) as update:
            targets = Targets(dict(update.targets))
            yield targets
            for member, error in targets.errors.items():
                update.failed(member, error)
        return
    targets = Targets({engine: str(getattr(engine, "url", type(engine).__name__))})
    yield targets
    if targets.errors:
        raise targets.errors[engine]


async def each(
    targets: Targets, call: Callable[[Engine], Awaitable[object]], timeout_s: float, what: str
) -> None:
    """Await ``call`` for all who are left at once; who fails or takes longer than ``timeout_s`` is
    marked failed.
    """

    async def one(engine: Engine) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await call(engine)
        except TimeoutError:
            targets.failed(
                engine,
                EngineUnavailable(f"{targets.targets[engine]}: {what} took over {timeout_s:g} s"),
            )
        except EngineFailure as error:
            targets.failed(engine, error)

    await asyncio.gather(*(one(engine) for engine in targets.left))
