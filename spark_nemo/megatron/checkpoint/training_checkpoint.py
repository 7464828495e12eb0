"""Training checkpoints: model, optimizer, schedule, generator state and the caller's state, in
torch_dist format.

``folder/step-00000012/`` is one checkpoint, ``folder/latest`` names the newest complete one. A
checkpoint is written under a temporary name, renamed, and only then named by ``latest``: a killed
job never leaves a half-written one behind that name. Loading reshards over tensor and pipeline
ranks.
"""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.hf_folder import replace_folder
from spark_nemo.utils.files import write_text_atomic

from .. import process_groups
from ..cpu_compat import cuda_means_cpu
from ..optimizer import padding_counted, prime_state, separate_steps, set_step
from ..packed_gpt import PackedGPT

LATEST = "latest"
MEGATRON_LM_LATEST = "latest_checkpointed_iteration.txt"
STATE_FILE = "state.json"
HF_FILES = "hf"
"""Subfolder of a Megatron checkpoint with the files of the Hugging Face model that are not weights.
"""


def has_checkpoint(folder: str | Path) -> bool:
    """Whether ``folder`` holds a complete checkpoint. No communication."""
    return (Path(folder) / LATEST).is_file()


def newest(folder: str | Path) -> Path:
    """The folder of the newest step, where ``folder`` is a run's or Megatron-LM's folder of
    checkpoints, else ``folder`` itself. Raises ``ConfigError`` when the step that is named is not
    there.
    """
    folder = Path(folder)
    if (folder / LATEST).is_file():
        return _named(folder, (folder / LATEST).read_text(errors="replace").strip(), LATEST)
    if (folder / MEGATRON_LM_LATEST).is_file():
        text = (folder / MEGATRON_LM_LATEST).read_text(errors="replace").strip()
        return _named(
            folder,
            text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else text,
            MEGATRON_LM_LATEST,
        )
    return folder


def save(
    folder: str | Path,
    model: PackedGPT,
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
    keep: int,
    files: Mapping[str, bytes],
    hf_config: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of step ``scheduler.num_steps`` and return its folder. Collective.

    ``state`` must survive JSON (``TypeError`` names it otherwise). ``files`` of the main rank lie
    in the folder under their names. Older checkpoints than the newest ``keep`` go. With
    ``hf_config`` the folder converts to Hugging Face on its own.
    """
    name, text = f"step-{scheduler.num_steps:08d}", json.dumps(state)
    folder = Path(folder)
    temporary, target = folder / f".{name}.tmp", folder / name

    def start() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / STATE_FILE).write_text(text)
        if hf_config is not None:
            (temporary / HF_FILES).mkdir()
            (temporary / HF_FILES / "config.json").write_text(json.dumps(hf_config, indent=2))
        for file_name, content in files.items():
            (temporary / file_name).write_bytes(content)

    def finish() -> None:
        replace_folder(temporary, target)
        write_text_atomic(folder / LATEST, name)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            if old.name != name:
                shutil.rmtree(old)

    process_groups.on_main_rank(start)
    # Saving is synchronous, so the results of the writers stay in this process. Megatron would
    # start a manager process for them: seconds of imports, and a hang in scripts without a __main__
    # guard.
    filesystem_async._results_queue = queue.Queue()
    with cuda_means_cpu():
        tensors = _sharded_state(model, optimizer, loading=False)
        tensors["step"], tensors["rng"] = scheduler.num_steps, torch.get_rng_state()
        dist_checkpointing.save(
            tensors,
            str(temporary),
            get_default_save_sharded_strategy("torch_dist"),
            content_metadata=_metadata(optimizer),
        )
    process_groups.on_main_rank(finish)
    return target


def load(
    folder: str | Path,
    model: PackedGPT,
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Restore the newest checkpoint of ``folder`` and return the caller's state. Collective.

    Raises ``ConfigError`` when there is none, or when it does not fit this model and optimizer.
    """
    if not has_checkpoint(folder):
        raise ConfigError(f"{folder} has no checkpoint (no file {LATEST!r} in it)")
    source = newest(folder)
    with cuda_means_cpu():
        prime_state(optimizer)
        wanted = _sharded_state(model, optimizer, loading=True)
        # FP8 scales of Transformer Engine. A checkpoint written without it has none, and they are
        # not used here.
        wanted["model"] = {
            key: value for key, value in wanted["model"].items() if "_extra_state" not in key
        }
        try:
            loaded = dist_checkpointing.load(
                wanted, str(source), get_default_load_sharded_strategy(str(source))
            )
        except (CheckpointingException, KeyError) as error:
            raise ConfigError(
                f"checkpoint {source} does not fit this model, megatron.distributed_optimizer or "
                f"megatron.dtype: {str(error).splitlines()[0]}"
            ) from error
        model.load_state_dict(
            loaded["model"], strict=False
        )  # "strict" counts Transformer Engine's extra states
        optimizer.load_state_dict(loaded["optimizer"])
        separate_steps(optimizer)
    set_step(scheduler, loaded["step"])
    torch.set_rng_state(loaded["rng"])
    return json.loads((source / STATE_FILE).read_text())


def _sharded_state(model: PackedGPT, optimizer: ChainedOptimizer, loading: bool) -> dict[str, Any]:
    metadata = _metadata(optimizer)
    weights = model.sharded_state_dict(metadata=metadata)
    with padding_counted(optimizer):
        state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    for part in (
        state.values() if 0 in state else [state]
    ):  # one for each of several chained optimizers
        if (
            part.get("param_state", ()) is None
        ):  # gathered elsewhere; Megatron would warn that ranks differ
            del part["param_state"]
    return {"model": weights, "optimizer": state}


def _metadata(optimizer: ChainedOptimizer) -> dict[str, Any]:
    common = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if optimizer.config.use_distributed_optimizer:
        # The only format of the distributed optimizer that can be read by another number of tensor
        # or data ranks. Gathered where it is written, in CPU memory. Otherwise every rank gathers
        # its stage's whole optimizer state, on the GPU as well: twice 4 bytes per parameter there
        # (61 GB for 7.6B parameters on one tensor rank), and in the machine's memory 12 bytes per
        # parameter and rank.
        return {
            **common,
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
        }
    return common


def _named(folder: Path, name: str, by: str) -> Path:
    if not name or Path(name).name != name or not (folder / name).is_dir():
        raise ConfigError(f"{folder / by} names {name!r}, which is not a folder beside it")
    return folder / name
