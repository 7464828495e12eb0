"""One export of the trainer's weights: checked against the plan, hashed and put into buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from spark_nemo.megatron.worker import MegatronWorker

from .checksum import ExpectedChecksums
from .sync_plan import SyncPlan


@dataclass(frozen=True)
class Bucket:
    """Tensors to send together; ``flat_B`` (uint8) has their bytes until the next bucket."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    flat_B: torch.Tensor
    is_last: bool

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors as views of ``flat_B``."""
        views = []
        start = 0
        for name, shape in zip(self.names, self.shapes):
            stop = start + math.prod(shape) * self.dtype.itemsize
            views.append((name, self.flat_B[start:stop].view(self.dtype).view(shape)))
            start = stop
        return views


class MemoryAccount:
    """Bytes that a push holds on this rank in addition to the model, with a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.peak = 0

    def hold(self, num_bytes: int) -> None:
        """Add ``num_bytes``; negative numbers release. Raises ``MemoryError`` above the limit."""
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
        if self.held > self.limit:
            raise MemoryError(
                f"a weight sync holds {self.held} bytes: the plan allows one bucket and one tensor, "
                f"{self.limit}"
            )


class Export:
    """One pass over the trainer's tensors on the main rank. The other ranks only ``drain``.

    Collective: an export that was begun must be run to its end on every rank, with ``drain`` after
    an error.
    """

    def __init__(
        self, worker: MegatronWorker, plan: SyncPlan, expected: ExpectedChecksums | None = None
    ) -> None:
        self.plan = plan
        self.expected = expected
        self.dtype = worker.dtype
        self.memory = MemoryAccount(plan.buffer_bytes + plan.largest_bytes)
        self._tensors = worker.export_hf()
        self._planned = iter(plan.tensors)
        self._current_bytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor, valid until the next. Raises ``ValueError`` if the plan differs."""
        for name, tensor in self._tensors:
            shape = tuple(tensor.shape)
            planned = next(self._planned, None)
            if planned is None or (name, shape) != (planned.name, planned.shape):
                plan_has = (planned.name, planned.shape) if planned is not None else "no more"
                raise ValueError(f"the trainer exported {name} {shape}, the plan has {plan_has}")
            self.memory.hold(tensor.nbytes - self._current_bytes)
            self._current_bytes = tensor.nbytes
            if self.expected is not None:
                self.expected.add(name, tensor)
            yield name, tensor
            del tensor  # the next tensor must not be made while this one is alive
        self.memory.hold(-self._current_bytes)
        self._current_bytes = 0
        missing = next(self._planned, None)
        if missing is not None:
            raise ValueError(f"the trainer did not export {missing.name}, which the plan has")

    def buckets(self, buffer_B: torch.Tensor) -> Iterator[Bucket]:
        """Yield the plan's buckets in ``buffer_B`` (uint8 [plan.buffer_bytes]).

        A bucket overwrites the one before it. A tensor larger than a bucket is not copied: its
        ``flat_B`` is its own memory.
        """
        self.memory.hold(buffer_B.nbytes)
        tensors = iter(self)
        for number, names in enumerate(self.plan.buckets):
            shapes = []
            used = 0
            for _ in names:
                _, tensor = next(tensors)
                shapes.append(tuple(tensor.shape))
                flat_B = tensor.detach().reshape(-1).view(torch.uint8)
                if flat_B.numel() <= buffer_B.numel():
                    buffer_B[used : used + flat_B.numel()].copy_(flat_B)
                    used += flat_B.numel()
                    flat_B = buffer_B
                elif len(names) > 1:
                    raise ValueError(
                        f"bucket {number} of the plan does not fit the buffer of "
                        f"{buffer_B.numel()} bytes"
                    )
                del tensor  # see __iter__
            yield Bucket(
                names=names,
                shapes=tuple(shapes),
                dtype=self.dtype,
                flat_B=flat_B[:used] if used else flat_B,
                is_last=number + 1 == len(self.plan.buckets),
            )
            del flat_B  # it may be a large tensor's own memory
        # The export is collective: run it to its end.
        next(tensors, None)
        self.memory.hold(-buffer_B.nbytes)

    def drain(self) -> None:
        """Take part in the rest of the export without using the tensors."""
        for _ in self._tensors:
            pass
