"""Training checkpoints in torch_dist format: model, optimizer, schedule, RNG and caller's state.

``folder/step-00000012/`` is one checkpoint, ``folder/latest`` names the newest complete one. A
checkpoint is written under a temporary name, then renamed, then named by ``latest``; so ``latest``
never names a half-written one. Loading reshards over tensor and pipeline ranks.
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
from spark_nemo.utils.files import replace_folder, write_text_atomic

from .. import process_groups
from ..cpu_compat import cuda_means_cpu
from ..optimizer import padding_counted, prime_state, separate_steps, set_step
from ..packed_gpt import PackedGPT

LATEST = "latest"
MEGATRON_LM_LATEST = "latest_checkpointed_iteration.txt"
STATE_FILE = "state.json"
HF_FILES = "hf"
"""Subfolder of a Megatron checkpoint with the Hugging Face model's files other than weights."""


def has_checkpoint(folder: str | Path) -> bool:
    """True if ``folder`` has a complete checkpoint. Not collective."""
    return (Path(folder) / LATEST).is_file()


def newest(folder: str | Path) -> Path:
    """Return the folder of the newest step of a run, or of Megatron-LM's; else ``folder`` itself.

    Raises ``ConfigError`` when the folder of that step is missing.
    """
    folder = Path(folder)
    if (folder / LATEST).is_file():
        return _named(folder, (folder / LATEST).read_text(errors="replace").strip(), LATEST)
    if (folder / MEGATRON_LM_LATEST).is_file():
        name = (folder / MEGATRON_LM_LATEST).read_text(errors="replace").strip()
        if name.isdecimal():  # otherwise it is "release"
            name = f"iter_{int(name):07d}"
        return _named(folder, name, MEGATRON_LM_LATEST)
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

    ``state`` must be JSON-able, else ``TypeError``. The main rank's ``files`` are written into the
    folder under their names. Only the newest ``keep`` checkpoints stay. With ``hf_config`` the
    folder can be converted to Hugging Face without other files.
    """
    folder = Path(folder)
    name = f"step-{scheduler.num_steps:08d}"
    temporary = folder / f".{name}.tmp"
    target = folder / name
    state_text = json.dumps(state)

    def start() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / STATE_FILE).write_text(state_text)
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
    # Saving is synchronous, so the writers' results can stay in this process. Megatron would start
    # a manager process for them: seconds of imports, and a hang in scripts without a main guard.
    filesystem_async._results_queue = queue.Queue()
    with cuda_means_cpu():
        tensors = sharded_state(model, optimizer, loading=False)
        tensors["step"] = scheduler.num_steps
        tensors["rng"] = torch.get_rng_state()
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

    Raises ``ConfigError`` if it is missing, or does not fit this model and optimizer.
    """
    if not has_checkpoint(folder):
        raise ConfigError(f"{folder} does not have a checkpoint (the file {LATEST!r} is missing)")
    source = newest(folder)
    with cuda_means_cpu():
        prime_state(optimizer)
        wanted = sharded_state(model, optimizer, loading=True)
        # The FP8 scales of Transformer Engine are not used, and a checkpoint written without it
        # does not have them.
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
        # Not strict: that would require Transformer Engine's extra states.
        model.load_state_dict(loaded["model"], strict=False)
        optimizer.load_state_dict(loaded["optimizer"])
        separate_steps(optimizer)
    set_step(scheduler, loaded["step"])
    torch.set_rng_state(loaded["rng"])
    return json.loads((source / STATE_FILE).read_text())


def sharded_state(model: PackedGPT, optimizer: ChainedOptimizer, loading: bool) -> dict[str, Any]:
    """Return the tree of sharded tensors to save, or to load into. Collective."""
    metadata = _metadata(optimizer)
    weights = model.sharded_state_dict(metadata=metadata)
    with padding_counted(optimizer):
        state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    parts = state.values() if 0 in state else [state]  # one for each of several chained optimizers
    for part in parts:
        # None where another rank gathers the state; Megatron would warn that the ranks differ.
        if part.get("param_state", ()) is None:
            del part["param_state"]
    return {"model": weights, "optimizer": state}


def _metadata(optimizer: ChainedOptimizer) -> dict[str, Any]:
    common = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if optimizer.config.use_distributed_optimizer:
        # The only format of the distributed optimizer that another number of tensor or data ranks
        # can read. "mem_efficient" gathers the state in CPU memory on the rank that writes it.
        # Otherwise every rank gathers its stage's whole optimizer state, on the GPU as well: twice
        # 4 bytes per parameter there (61 GB for 7.6B parameters on one tensor rank), and 12 bytes
        # per parameter and rank in the machine's memory.
        return {
            **common,
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
        }
    return common


def _named(folder: Path, name: str, by: str) -> Path:
    if not name or Path(name).name != name or not (folder / name).is_dir():
        raise ConfigError(f"{folder / by} names {name!r}, which is not a folder next to it")
    return folder / name
