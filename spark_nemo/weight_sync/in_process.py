"""Weights into an engine of the main rank's own process, tensor by tensor, without a file in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import torch

from spark_nemo.engines.base import Engine, EngineFailure
from spark_nemo.megatron.distributed import broadcast_object
from spark_nemo.megatron.worker import MegatronWorker


def push_weights(worker: MegatronWorker, engine: Engine | None, version: int) -> None:
    """Give ``engine`` the worker's weights as ``version``. Collective; only the main rank has an engine.

    Blocks until the engine serves them. Where an event loop already runs, await ``push_weights_async``. Raises
    ``EngineFailure`` on every rank when the engine refuses, and ``ValueError`` when the main rank has no engine.
    """
    asyncio.run(push_weights_async(worker, engine, version))


async def push_weights_async(worker: MegatronWorker, engine: Engine | None, version: int) -> None:
    """``push_weights`` inside the event loop that owns the engine."""
    if worker.is_main and engine is None:
        raise ValueError("push_weights on the main rank needs the engine")
    tensors, failure = worker.export_hf(), None
    if engine is not None and worker.is_main:
        try:
            await engine.update_weights(_owned(tensors), version)
        except EngineFailure as error:
            failure = str(error)
    # The other ranks, and what an engine that refused left over: the export is collective to its end.
    for _ in tensors:
        pass
    if (failure := broadcast_object(failure)) is not None:
        raise EngineFailure(f"weights version {version}: {failure}")


def _owned(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    # An exported tensor may be the parameter itself, which the next optimizer step would change under the engine.
    return ((name, tensor.clone()) for name, tensor in tensors)
