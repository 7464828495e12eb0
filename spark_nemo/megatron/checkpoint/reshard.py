"""Rewriting a training checkpoint, weights and optimizer state, for another parallel layout.

Any layout can read torch_dist as it is: a rank reads the stored boxes that overlap its part of the
tensors, each box as a whole. Rewriting cuts the boxes for the ranks of the new layout, so that no
rank reads more than its part. The values do not change.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_config import read_hf_config
from spark_nemo.models.hf_folder import copy_companions
from spark_nemo.models.spec import ModelSpec
from spark_nemo.utils.progress_bar import progress_bar

from .compare_tensors import compare_stored
from .global_tensors import GlobalTensors, Piece, check_stored_shapes, has_layers_apart
from .resumable import folder_fingerprint, resumable_folder
from .torch_dist_reader import StoredCheckpoint
from .torch_dist_writer import Box, Source, write_torch_dist
from .training_checkpoint import HF_FILES, LATEST, STATE_FILE, newest

STATES = "optimizer.state."
SHARDING = "distrib_optim_sharding_type"


@dataclass(frozen=True)
class Resharded:
    """Source, target and size of a finished rewrite."""

    source: Path
    target: Path
    num_tensors: int
    num_boxes: int


def reshard(
    source: str | Path,
    target: str | Path,
    layout: MegatronConfig,
    hf_config_from: str | Path | None = None,
    show_progress: bool = False,
) -> Resharded:
    """Write the newest checkpoint of run folder ``source``, cut for ``layout``, into ``target``.

    Afterwards every tensor of the two is compared bit by bit. Raises ``ConfigError`` when
    ``layout`` cannot split the model, and when only the layout that wrote the optimizer's state can
    read it.
    """
    source = Path(source)
    target = Path(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"output folder {target} is inside {source}: choose another")
    step = newest(source)
    stored = StoredCheckpoint(step)
    _check_optimizer(stored)
    config_folder = Path(hf_config_from) if hf_config_from else step / HF_FILES
    config = read_hf_config(config_folder)
    spec = ModelSpec.from_hf(config, f"{config_folder}/config.json")
    spec.check_layout(layout)
    if has_layers_apart(stored.weights()):
        raise ConfigError(
            f"{step}: resharding does not support layers with their own keys "
            "(non_homogeneous_layers); the code that wrote it resumes it under any layout, and it "
            "can be converted"
        )
    tensors = GlobalTensors.of(spec)
    check_stored_shapes(
        {key: tensor.shape for key, tensor in stored.weights().items()}, tensors, str(step)
    )
    _check_states(stored)
    boxes = _boxes(stored, tensors, layout)

    def read(number: int) -> Tensor:
        return stored.read(boxes[number].key, boxes[number].offset, boxes[number].size)

    job = {
        "files": folder_fingerprint(source),
        "layout": [layout.tensor_parallel, layout.pipeline_parallel],
        "hf_config": config,
    }
    with (
        resumable_folder(target, job) as folder,
        progress_bar(
            total=sum(box.num_bytes for box in boxes),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not show_progress,
            desc="reshard",
        ) as bar,
    ):
        inside = folder if step == source else folder / step.name
        objects = {key: (lambda key=key: stored.read_object(key)) for key in stored.objects}
        inside.mkdir(exist_ok=True)
        write_torch_dist(
            inside, Source(boxes, read, objects), bar.update, common=step / "common.pt"
        )
        _carry_over(step, source, inside, folder)
        for difference in compare_stored(stored, StoredCheckpoint(inside)):
            if difference.found != "same":
                raise ConfigError(
                    f"tensor {difference.name} of {inside} differs from {step}: the disk or the "
                    "memory of this machine changes bits"
                )
    return Resharded(step, target, len(stored.tensors), len(boxes))


def _check_states(stored: StoredCheckpoint) -> None:
    """Raise ``ConfigError`` unless each optimizer state covers all weights, in their shapes."""
    weights = stored.weights()
    found: dict[str, list[str]] = {}
    for key, tensor in stored.tensors.items():
        if not key.startswith(STATES):
            continue
        state, _, weight = key.removeprefix(STATES).partition(".")
        found.setdefault(state, []).append(weight)
        if weight not in weights:
            raise ConfigError(f"tensor {key} in {stored.folder}: its weight is not there")
        if weights[weight].shape != tensor.shape:
            raise ConfigError(
                f"tensor {key} in {stored.folder} has shape {tensor.shape}, its weight "
                f"{weights[weight].shape}"
            )
    for state, names in found.items():
        missing = sorted(set(weights) - set(names))
        if missing:
            raise ConfigError(f"{stored.folder} lacks tensor {STATES}{state}.{missing[0]}")


def _check_optimizer(stored: StoredCheckpoint) -> None:
    kind = (stored.common().get("content_metadata") or {}).get(SHARDING)
    flat = [key for key in stored.tensors if key.startswith("optimizer.distributed")]
    if flat or kind not in (None, "fully_reshardable"):
        raise ConfigError(
            f"the optimizer state of {stored.folder} is {kind or 'flat'}: only the tensor and "
            "pipeline layout that wrote it can read it; resume it there and save it with "
            f"{SHARDING}='fully_reshardable', as this project does"
        )


def _boxes(stored: StoredCheckpoint, tensors: GlobalTensors, layout: MegatronConfig) -> list[Box]:
    """Return the boxes to write: weights and their states as the ranks will read them."""
    # All layers of a key are cut alike, so any of its pieces will do.
    piece_of = {stored.prefix + piece.key: piece for piece in tensors.pieces}
    boxes = []
    for key, tensor in stored.tensors.items():
        weight = key.removeprefix(STATES).partition(".")[2] if key.startswith(STATES) else key
        piece = piece_of.get(weight)
        if piece is None:
            parts = list(tensor.chunks)
        else:
            parts = _cut_for_ranks(tensor.shape, piece, layout.tensor_parallel)
        boxes += [Box(key, tensor.shape, tensor.dtype, offset, size) for offset, size in parts]
    return boxes


def _cut_for_ranks(
    shape: tuple[int, ...], piece: Piece, tensor_parallel: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    leading = _stacked_axes(piece)
    dim = piece.param.split.shard_dim
    is_expert = piece.param.expert is not None  # one tensor rank holds an expert as a whole
    if dim is None or is_expert or tensor_parallel == 1:
        return list(_cut(shape, leading, None, 1))
    # A rank's part of linear_fc1 is a piece of the gate and a piece of the up projection.
    halves = 2 if piece.key.endswith("linear_fc1.weight") else 1
    return list(_cut(shape, leading, leading + dim, halves * tensor_parallel))


def _stacked_axes(piece: Piece) -> int:
    """Return the number of axes over layers and experts."""
    if not piece.key.startswith("decoder.layers."):
        return 0
    return 1 if piece.param.expert is None else 2


def _cut(
    shape: tuple[int, ...], leading: int, dim: int | None, parts: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of boxes of one layer (and expert), cut into ``parts`` along ``dim``.

    The last part may be smaller. Without ``dim`` the boxes are not cut.
    """
    positions: list[tuple[int, ...]] = [()]
    for axis in range(leading):
        positions = [(*position, n) for position in positions for n in range(shape[axis])]
    for position in positions:
        offset = [*position, *(0,) * (len(shape) - leading)]
        size = [*(1,) * leading, *shape[leading:]]
        if dim is None:
            yield tuple(offset), tuple(size)
            continue
        step = math.ceil(shape[dim] / parts)
        for start in range(0, shape[dim], step):
            offset[dim] = start
            size[dim] = min(step, shape[dim] - start)
            yield tuple(offset), tuple(size)


def _carry_over(step: Path, source: Path, inside: Path, folder: Path) -> None:
    """Copy the caller's state and the model's files, and write the name of the newest step."""
    if (step / STATE_FILE).is_file():
        shutil.copyfile(step / STATE_FILE, inside / STATE_FILE)
    if (step / HF_FILES).is_dir():
        (inside / HF_FILES).mkdir(exist_ok=True)
        copy_companions(step / HF_FILES, inside / HF_FILES)
    if step != source:
        (folder / LATEST).write_text(step.name)
