"""Weights into an engine of the main rank's own process, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .transport import Targets, Transport
from .weight_stream import Export


class InProcessTransport(Transport):
    """Calls ``Engine.update_weights``, which takes effect between two tokens."""

    # The engine drops its cached prefixes itself.
    needs_pause = False

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``. Raises the engine's ``EngineFailure``; then no weight has changed."""
        for engine in targets.remaining:
            await engine.update_weights(_copies(export), version)


def _copies(export: Export) -> Iterator[tuple[str, torch.Tensor]]:
    # An exported tensor may be the parameter itself, which the next optimizer step changes in place
    # while the engine serves.
    for name, tensor in export:
        yield name, tensor.clone()
