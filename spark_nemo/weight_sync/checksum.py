"""Checksums of every tensor on both sides of a sync: proof that an engine serves the trainer's weights.

The hash is SGLang's own (``tensor_digest``). It differs between GPU and CPU, so trainer and server
must both be on GPUs or both on CPUs. The trainer never builds an engine's fused tensors: their
pieces are hashed as the export brings them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from spark_nemo.models.param_mapping import EMBEDDING, HEAD

from .engine_view import EngineTensor, Piece, Slice
from .sync_plan import SyncPlan
from .tensor_digest import TensorDigest, digest_for

_BLOCK_BYTES = 16 << 20
Checksums = list[dict[str, str]]
"""For each engine rank, the hash of every parameter by the engine's name for it."""
ServedForm = Callable[[str, torch.Tensor], torch.Tensor]
"""Converts the named Hugging Face tensor to the form in which an engine stores it."""


class ExpectedChecksums:
    """Checksums that the engine's ranks should report, computed while the tensors are exported."""

    def __init__(
        self,
        ranks: Sequence[Sequence[EngineTensor]],
        dtype: torch.dtype,
        served_form: ServedForm | None = None,
    ) -> None:
        self._dtype = dtype
        self._served_form = served_form
        self._hashes = [{tensor.name: _TensorHash(tensor) for tensor in rank} for rank in ranks]
        self._readers: dict[str, list[_TensorHash]] = {}
        """The engine tensors that contain pieces of a Hugging Face tensor."""
        for rank_hashes in self._hashes:
            for tensor_hash in rank_hashes.values():
                for name in tensor_hash.source_names():
                    self._readers.setdefault(name, []).append(tensor_hash)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Hash the next tensor of the export.

        The pieces of an engine tensor must come in the order of its rows.
        """
        if self._served_form is not None:
            tensor = self._served_form(name, tensor)
        # Ranks that share a slice read it once.
        readers_of: dict[Slice, list[_TensorHash]] = {}
        for reader in self._readers.get(name, ()):
            readers_of.setdefault(reader.next_slice(name), []).append(reader)
        for part, readers in readers_of.items():
            for block in _blocks(tensor, part):
                for reader in readers:
                    reader.update(block)

    def result(self) -> Checksums:
        """Return all checksums. Raises ``ValueError`` if a tensor is still incomplete."""
        return [
            {name: tensor_hash.finish(self._dtype) for name, tensor_hash in rank_hashes.items()}
            for rank_hashes in self._hashes
        ]


class _TensorHash:
    """Hash of an engine tensor, of which the first rows have been added."""

    def __init__(self, tensor: EngineTensor) -> None:
        self._name = tensor.name
        self._pending = list(tensor.pieces)
        self._elements = math.prod(tensor.shape)
        self._digest: TensorDigest | None = None
        self._device = torch.device("cpu")

    def source_names(self) -> list[str]:
        """Return the Hugging Face tensors of its pieces, each once."""
        names = (piece.name for piece in self._pending if piece.name is not None)
        return list(dict.fromkeys(names))

    def next_slice(self, name: str) -> Slice:
        piece = self._pending.pop(0)
        if piece.name != name:
            raise ValueError(f"checksum of {self._name}: {name} came before {piece.name}")
        return piece.slice

    def update(self, block: torch.Tensor) -> None:
        if self._digest is None:
            self._digest = digest_for(block, self._elements * block.element_size())
            self._device = block.device
        self._digest.update(block)

    def finish(self, dtype: torch.dtype) -> str:
        for piece in self._pending:
            if piece.name is not None:
                raise ValueError(f"checksum of {self._name}: {piece.name} never came")
            height = piece.slice.height
            width = piece.slice.width
            self.update(torch.zeros(height, width, dtype=dtype, device=self._device))
        assert self._digest is not None
        return self._digest.hexdigest()


def _blocks(tensor: torch.Tensor, part: Slice) -> list[torch.Tensor]:
    """Return a slice as views of some rows each.

    Hashing copies columns, so the blocks bound that copy.
    """
    rows = tensor[part.rows[0] : part.rows[1]]
    if part.columns is not None and part.columns != (0, tensor.shape[1]):
        rows = rows[:, part.columns[0] : part.columns[1]]
    step = max(1, _BLOCK_BYTES // max(1, part.width * tensor.element_size()))
    return [rows[start : start + step] for start in range(0, rows.shape[0], step)]


def by_checkpoint_name(plan: SyncPlan, tied: bool) -> list[list[EngineTensor]]:
    """Return the view of a one-rank engine that keeps tensors under their Hugging Face names.

    Such an engine copies a tied embedding for its head, so the head is a tensor of its own.
    """
    tensors = []
    for planned in plan.tensors:
        columns = (0, planned.shape[1]) if len(planned.shape) == 2 else None
        piece = Piece(planned.name, Slice((0, planned.shape[0]), columns))
        tensors.append(EngineTensor(planned.name, planned.shape, (piece,)))
        if tied and planned.name == EMBEDDING:
            tensors.append(EngineTensor(HEAD, planned.shape, (piece,)))
    return [tensors]


def differing(expected: Checksums, served: Checksums) -> list[str]:
    """Return the names of engine tensors that differ from the trainer's, with their rank."""
    if len(expected) != len(served):
        return [f"all: the engine has {len(served)} ranks, {len(expected)} were planned"]
    wrong = []
    for rank, (ours, theirs) in enumerate(zip(expected, served)):
        where = f" (rank {rank})" if len(expected) > 1 else ""
        wrong += [f"{name}{where}" for name, value in ours.items() if theirs.get(name) != value]
        wrong += [f"{name}{where} (never sent)" for name in theirs if name not in ours]
    return wrong
