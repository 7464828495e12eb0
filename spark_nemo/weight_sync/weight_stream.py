"""The trainer's weights as they stream past: compared with the plan, hashed, put into buckets,
memory counted.
"""

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
    """Tensors to send together; ``flat_B`` (uint8) holds their bytes one after the other until the
    next bucket.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    flat_B: torch.Tensor
    is_last: bool

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors as views of ``flat_B``."""
        views, start = [], 0
        for name, shape in zip(self.names, self.shapes):
            stop = start + math.prod(shape) * self.dtype.itemsize
            views.append((name, self.flat_B[start:stop].view(self.dtype).view(shape)))
            start = stop
        return views


class MemoryAccount:
    """Bytes that a push holds on this rank beyond the model; over the plan's limit it raises
    ``MemoryError``.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.peak = limit, 0, 0

    def hold(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more (negative: released)."""
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
        if self.held > self.limit:
            raise MemoryError(
                f"a weight sync holds {self.held} bytes: the plan allows one bucket and one tensor, "
                f"{self.limit}"
            )


class Export:
    """One pass over the trainer's tensors on the main rank. The other ranks only ``drain``.

    Collective: whoever begins must come to the end, with ``drain`` if something went wrong in
    between.
    """

    def __init__(
        self, worker: MegatronWorker, plan: SyncPlan, expected: ExpectedChecksums | None = None
    ) -> None:
        self.plan, self.expected, self.dtype = plan, expected, worker.dtype
        self.memory = MemoryAccount(plan.buffer_bytes + plan.largest_bytes)
        self._tensors = worker.export_hf()
        self._planned = iter(plan.tensors)
        self._current = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor, valid until the next. Raises ``ValueError`` when one is not what the plan
        says.
        """
        for name, tensor in self._tensors:
            planned = next(self._planned, None)
            if planned is None or (name, tuple(tensor.shape)) != (planned.name, planned.shape):
                raise ValueError(
                    f"the trainer exported {name} {tuple(tensor.shape)}, the plan has "
                    f"{planned and (planned.name, planned.shape)}"
                )
            self.memory.hold(tensor.nbytes - self._current)
            self._current = tensor.nbytes
            if self.expected is not None:
                self.expected.see(name, tensor)
            yield name, tensor
            del tensor  # not beside the next one
        self.memory.hold(-self._current)
        self._current = 0

    def buckets(self, buffer_B: torch.Tensor) -> Iterator[Bucket]:
        """The plan's buckets, in ``buffer_B`` (uint8 [plan.buffer_bytes]); the next overwrites the
        one before.

        A tensor larger than a bucket is not copied: ``flat_B`` is its own memory then.
        """
        self.memory.hold(buffer_B.nbytes)
        tensors = iter(self)
        for number, names in enumerate(self.plan.buckets):
            shapes, used = [], 0
            for _ in names:
                _, tensor = next(tensors)
                shapes.append(tuple(tensor.shape))
                flat_B = tensor.detach().reshape(-1).view(torch.uint8)
                if flat_B.numel() <= buffer_B.numel():
                    buffer_B[used : used + flat_B.numel()].copy_(flat_B)
                    flat_B, used = buffer_B, used + flat_B.numel()
                elif len(names) > 1:
                    raise ValueError(
                        f"bucket {number} of the plan does not fit the buffer of {buffer_B.numel()} bytes"
                    )
                del tensor
            yield Bucket(
                names,
                tuple(shapes),
                self.dtype,
                flat_B[:used] if used else flat_B,
                number + 1 == len(self.plan.buckets),
            )
            del flat_B
        next(tensors, None)  # to the end of the export
        self.memory.hold(-buffer_B.nbytes)

    def drain(self) -> None:
        """Take part in what is left."""
        for _ in self._tensors:
            pass
