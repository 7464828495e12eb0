"""A hash of every tensor on both sides of a sync, so that what an engine serves is what the trainer
has.

The hash is SGLang's own (``tensor_digest``), which is another one on a GPU than on a CPU:
trainer and server must both be on the one or on the other. The trainer's side never builds an
engine tensor: its pieces are hashed as the export brings them. That the GPU's hash is the server's
was checked with SGLang's kernel in Triton's interpreter only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .engine_view import EngineTensor, Piece, Slice
from .sync_plan import SyncPlan
from .tensor_digest import TensorDigest, digest_for

_BLOCK_BYTES = 16 << 20
Checksums = list[dict[str, str]]
"""For each engine rank, hash by the engine's name of the tensor."""
ServedForm = Callable[[str, torch.Tensor], torch.Tensor]


class ExpectedChecksums:
    """What the engine's ranks should report, made while the trainer's tensors stream past.

    ``served_form(name, tensor)`` is how the engine stores a Hugging Face tensor, when it does not
    store it as it is.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[EngineTensor]],
        dtype: torch.dtype,
        served_form: ServedForm | None = None,
    ) -> None:
        self._dtype, self._served_form = dtype, served_form
        self._open = [{tensor.name: _Running(tensor) for tensor in rank} for rank in ranks]
        self._readers: dict[str, list[_Running]] = {}
        for rank in self._open:
            for running in rank.values():
                for name in dict.fromkeys(
                    piece.name for piece in running.left if piece.name is not None
                ):
                    self._readers.setdefault(name, []).append(running)

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor of the export, whole. Its pieces must come in the order of the engine's
        rows.
        """
        if self._served_form is not None:
            tensor = self._served_form(name, tensor)
        hashed: dict[Slice, list[_Running]] = {}
        for running in self._readers.get(name, ()):
            hashed.setdefault(running.expect(name), []).append(running)
        for part, readers in hashed.items():
            for block in _blocks(tensor, part):
                for running in readers:
                    running.update(block)

    def result(self) -> Checksums:
        """All of them. Raises ``ValueError`` when the export ended before a tensor was whole."""
        return [
            {name: running.finish(self._dtype) for name, running in rank.items()}
            for rank in self._open
        ]


class _Running:
    """An engine tensor of which some rows are hashed already."""

    def __init__(self, tensor: EngineTensor) -> None:
        self.name, self.left = tensor.name, list(tensor.pieces)
        self._elements = math.prod(tensor.shape)
        self._digest: TensorDigest | None = None
        self._device = torch.device("cpu")

    def expect(self, name: str) -> Slice:
        piece = self.left.pop(0)
        if piece.name != name:
            raise ValueError(f"checksum of {self.name}: {name} came before {piece.name}")
        return piece.slice

    def update(self, block: torch.Tensor) -> None:
        if self._digest is None:
            self._digest = digest_for(block, self._elements * block.element_size())
            self._device = block.device
        self._digest.update(block)

    def finish(self, dtype: torch.dtype) -> str:
        for piece in self.left:
            if piece.name is not None:
                raise ValueError(f"checksum of {self.name}: {piece.name} never came")
            self.update(
                torch.zeros(piece.slice.height, piece.slice.width, dtype=dtype, device=self._device)
            )
        assert self._digest is not None
        return self._digest.hexdigest()


def _blocks(tensor: torch.Tensor, part: Slice) -> list[torch.Tensor]:
    """Views of a slice, some rows each; columns are copied block by block when they are hashed."""
    rows = tensor[part.rows[0] : part.rows[1]]
    if part.columns is not None and part.columns != (0, tensor.shape[1]):
        rows = rows[:, part.columns[0] : part.columns[1]]
    step = max(1, _BLOCK_BYTES // max(1, part.width * tensor.element_size()))
    return [rows[start : start + step] for start in range(0, rows.shape[0], step)]


def by_checkpoint_name(plan: SyncPlan, tied: bool) -> list[list[EngineTensor]]:
    """The view of an engine that keeps tensors under their Hugging Face names, in one rank.

    A tied model's head counts as a tensor of its own there: such an engine has a copy of the
    embedding for it.
    """
    tensors = [
        EngineTensor(t.name, t.shape, (Piece(t.name, _all_of(t.shape)),)) for t in plan.tensors
    ]
    if tied:
        embedding = next(t for t in tensors if t.name == "model.embed_tokens.weight")
        tensors.append(EngineTensor("lm_head.weight", embedding.shape, embedding.pieces))
    return [tensors]


def _all_of(shape: tuple[int, ...]) -> Slice:
    return Slice((0, shape[0]), (0, shape[1]) if len(shape) == 2 else None)


def differing(expected: Checksums, served: Checksums) -> list[str]:
    """Names of the engine tensors that are not what was sent, with ``(rank r)`` when the engine has
    several ranks.
    """
    if len(expected) != len(served):
        return [f"all: the engine has {len(served)} ranks, {len(expected)} were planned"]
    wrong = []
    for rank, (ours, theirs) in enumerate(zip(expected, served)):
        where = f" (rank {rank})" if len(expected) > 1 else ""
        wrong += [f"{name}{where}" for name, value in ours.items() if theirs.get(name) != value]
        wrong += [f"{name}{where} (never sent)" for name in theirs if name not in ours]
    return wrong
