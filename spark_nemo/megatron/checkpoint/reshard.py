"""A training checkpoint, weights and optimizer state, for another parallel layout.

torch_dist is read by any layout as it is: its tensors are whole models', and a rank reads the boxes
that overlap its share, each box completely. Rewriting cuts the boxes as the ranks of the new layout
will want them, so that none reads more than its own. The values do not change.
"""

from __future__ import annotations

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
    """What was read, and what was written."""

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
    """Write the newest checkpoint of the run folder ``source`` into the new run folder ``target``,
    cut for ``layout``, and compare every tensor of the two bit by bit.

    Raises ``ConfigError`` when the model cannot be split as ``layout`` says, and when the
    optimizer's state is in a format that only the layout that wrote it can read.
    """
    source, target = Path(source), Path(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"output folder {target} is inside {source}: name another")
    step = newest(source)
    stored = StoredCheckpoint(step)
    _check_optimizer(stored)
    config_folder = Path(hf_config_from) if hf_config_from else step / HF_FILES
    config = read_hf_config(config_folder)
    spec = ModelSpec.from_hf(config, f"{config_folder}/config.json")
    spec.check_layout(layout)
    if has_layers_apart(stored.weights()):
        raise ConfigError(
            f"{step} has every layer under keys of its own (non_homogeneous_layers), which is "
            "not resharded: the code that wrote it resumes it under any layout, and it can be converted"
        )
    tensors = GlobalTensors.of(spec)
    check_stored_shapes(
        {key: tensor.shape for key, tensor in stored.weights().items()}, tensors, str(step)
    )
    check_states(stored)
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
                    f"tensor {difference.name} of {inside} is not that of {step}: the disk or the memory "
                    "of this machine changes bits"
                )
    return Resharded(step, target, len(stored.tensors), len(boxes))


def check_states(stored: StoredCheckpoint) -> dict[str, list[str]]:
    """Of every optimizer state ("exp_avg", ...), the parameters it is for. ``ConfigError`` names
    one that is missing or of another shape than its weight.
    """
    weights, found = stored.weights(), {}
    for key, tensor in stored.tensors.items():
        if key.startswith(STATES):
            state, _, weight = key.removeprefix(STATES).partition(".")
            found.setdefault(state, []).append(weight)
            if weight not in weights or weights[weight].shape != tensor.shape:
                raise ConfigError(
                    f"tensor {key} in {stored.folder} has shape {tensor.shape}, its weight "
                    f"{weights[weight].shape if weight in weights else 'is not there'}"
                )
    for state, names in found.items():
        if missing := sorted(set(weights) - set(names)):
            raise ConfigError(f"{stored.folder} lacks tensor {STATES}{state}.{missing[0]}")
    return found


def _check_optimizer(stored: StoredCheckpoint) -> None:
    kind = (stored.common().get("content_metadata") or {}).get(SHARDING)
    flat = [key for key in stored.tensors if key.startswith("optimizer.distributed")]
    if flat or kind not in (None, "fully_reshardable"):
        raise ConfigError(
            f"the optimizer state of {stored.folder} is {kind or 'flat'}: only the tensor and pipeline layout that "
            f"wrote it can read it. Resume it there and save it with {SHARDING}='fully_reshardable', as this project "
            "does"
        )


def _boxes(stored: StoredCheckpoint, tensors: GlobalTensors, layout: MegatronConfig) -> list[Box]:
    prefix = stored.prefix
    cut_at = {
        (prefix + piece.key): piece for piece in tensors.pieces
    }  # every layer of a key is cut alike
    boxes = []
    for key, tensor in stored.tensors.items():
        weight = key.removeprefix(STATES).partition(".")[2] if key.startswith(STATES) else key
        piece = cut_at.get(weight)
        if piece is None:
            parts = [(offset, size) for offset, size in tensor.chunks]
        else:
            leading = _stacked(piece)
            dim = piece.param.split.shard_dim
            halves = 2 if weight.endswith("linear_fc1.weight") else 1
            ranks = 1 if dim is None or piece.param.expert is not None else layout.tensor_parallel
            parts = list(
                _cut(tensor.shape, leading, None if ranks == 1 else leading + dim, halves * ranks)
            )
        boxes += [Box(key, tensor.shape, tensor.dtype, offset, size) for offset, size in parts]
    return boxes


def _stacked(piece: Piece) -> int:
    """Axes over layers and experts."""
    return (
        0 if not piece.key.startswith("decoder.layers.") else 1 if piece.param.expert is None else 2
    )


def _cut(
    shape: tuple[int, ...], leading: int, dim: int | None, parts: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of one layer (and expert) each, cut into ``parts`` along ``dim``; the last may be
    smaller.
    """
    positions: list[tuple[int, ...]] = [()]
    for axis in range(leading):
        positions = [(*position, n) for position in positions for n in range(shape[axis])]
    length = shape[dim] if dim is not None else 0
    step = -(-length // parts) if dim is not None else 1
    for position in positions:
        offset, size = (
            [*position, *(0,) * (len(shape) - leading)],
            [*(1,) * leading, *shape[leading:]],
        )
        for start in range(0, length, step) if dim is not None else (0,):
            if dim is not None:
                offset[dim], size[dim] = start, min(step, length - start)
            yield tuple(offset), tuple(size)


def _carry_over(step: Path, source: Path, inside: Path, folder: Path) -> None:
    """The caller's state, the model's files, and the name of the newest step."""
    if (step / STATE_FILE).is_file():
        shutil.copyfile(step / STATE_FILE, inside / STATE_FILE)
    if (step / HF_FILES).is_dir():
        (inside / HF_FILES).mkdir(exist_ok=True)
        copy_companions(step / HF_FILES, inside / HF_FILES)
    if step != source:
        (folder / LATEST).write_text(step.name)
