"""Weights into an engine of the main rank's own process, tensor by tensor, without a file in
between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .transport import Targets, Transport
from .weight_stream import Export


class InProcessTransport(Transport):
    """``Engine.update_weights``: takes effect between two tokens and drops the cached prefixes
    itself.
    """

    needs_pause = False

    async def send(self, export: Export, targets: Targets, version: int) -> None:
        """See ``Transport``. Raises the engine's ``EngineFailure``; then no weight has changed."""
        for engine in targets.left:
            await engine.update_weights(_owned(export), version)


def _owned(export: Export) -> Iterator[tuple[str, torch.Tensor]]:
    # An exported tensor may be the parameter itself, which the next optimizer step would change
    # under the engine.
    return ((name, tensor.clone()) for name, tensor in export)
