"""Process groups of the trainer ranks, and the exchange of Python objects between the ranks."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import ConfigError
from spark_nemo.utils.slurm import slurm_task

from .cpu_compat import cuda_means_cpu

logger = logging.getLogger(__name__)
T = TypeVar("T")

OBJECT_TIMEOUT = timedelta(days=30)
"""Timeout of ``broadcast_object`` and ``gather_objects``.

The other ranks wait there while the main rank generates, verifies, evaluates or starts servers for
hours; torch's defaults would end their wait after 10 minutes (NCCL) or 30 (gloo). A rank that dies
still fails the others at once, because its connections close.
"""
DEFAULT_GROUP_TIMEOUT = timedelta(hours=2)
"""Timeout of the default group.

megatron-core ends a checkpoint with a barrier there, and ranks with nothing to write reach it
first. NCCL's watchdog would end their process after 10 minutes, which is not always enough to write
a 70B model's terabyte.
"""
_control: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
"""The default group, and the gloo group of all ranks that carries Python objects."""


def initialize(layout: MegatronConfig) -> None:
    """Join the other ranks and build Megatron's process groups for ``layout``; idempotent.

    Ranks come from torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or are the tasks of one
    ``srun``; a process started alone is a world of one. A call with another layout of the same size
    replaces the groups, and workers built before it must no longer be used. Raises ``ConfigError``
    when the number of ranks is not ``layout.world_size``.
    """
    rank, world_size = _rank_and_world_size()
    if world_size != layout.world_size:
        raise ConfigError(
            f"megatron.tensor_parallel={layout.tensor_parallel} x "
            f"pipeline_parallel={layout.pipeline_parallel} x data_parallel={layout.data_parallel} "
            f"needs {layout.world_size} processes and {world_size} run: start with "
            f"srun --ntasks={layout.world_size} or torchrun --nproc-per-node {layout.world_size}, "
            "or change megatron.data_parallel"
        )
    if not dist.is_initialized():
        _join(rank, world_size)
    if world_size > 1:
        _control_group()
    _build_groups(layout)


def rank() -> int:
    """Return the global rank; 0 before ``initialize``."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 before ``initialize``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast_object(value: T | None, source: int = 0) -> T:
    """Return the picklable ``value`` of rank ``source`` on every rank. Collective."""
    if world_size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    with cuda_means_cpu():
        dist.broadcast_object_list(box, src=source, group=_control_group())
    return box[0]  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """Return every rank's picklable ``value``, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    with cuda_means_cpu():
        dist.all_gather_object(box, value, group=_control_group())
    return box


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
    """Return the named CPU tensors of rank ``source`` on every rank. Collective.

    Token ids of a large batch take seconds to pickle; as tensors they are sent as they are.
    """
    if world_size() == 1:
        return dict(tensors or {})
    is_source = rank() == source
    layout = broadcast_object(
        {name: (tensor.shape, tensor.dtype) for name, tensor in (tensors or {}).items()}, source
    )
    received = {}
    with cuda_means_cpu():
        for name, (shape, dtype) in layout.items():
            if is_source:
                tensor = tensors[name].contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype)
            if tensor.numel():
                dist.broadcast(tensor, src=source, group=_control_group())
            received[name] = tensor
    return received


def on_main_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; every rank returns its result or raises its error. Collective."""
    return broadcast_object(only_on_main_rank(action))  # type: ignore[return-value]


def only_on_main_rank(action: Callable[[], T]) -> T | None:
    """Run ``action`` on rank 0, which alone gets its result; raise its error on every rank.

    Collective. Otherwise an error of rank 0, a full disk for example, would leave the others
    waiting in their next collective.
    """
    result: T | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = action()
        except (OSError, ValueError, RuntimeError) as caught:
            error = caught
    error = broadcast_object(error)
    if error is not None:
        raise error
    return result


def _rank_and_world_size() -> tuple[int, int]:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        world_size = int(os.environ["WORLD_SIZE"])
        if world_size > 1 and "MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE={world_size} but MASTER_ADDR is not set: export MASTER_ADDR and "
                "MASTER_PORT, or start with torchrun"
            )
        return int(os.environ["RANK"]), world_size
    task = slurm_task()
    if task is not None:
        os.environ.setdefault("MASTER_ADDR", task.master_address)
        os.environ.setdefault("MASTER_PORT", str(task.master_port))
        return task.rank, task.world_size
    return 0, 1


def _join(rank: int, world_size: int) -> None:
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        # Slurm may show each task its own device only.
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    interfaces = {name for _, name in socket.if_nameindex()}
    if address in ("127.0.0.1", "localhost") and "lo" in interfaces:
        # Without it gloo resolves the host name, which fails in containers and on laptops.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(backend, rank=rank, world_size=world_size)
    # Not as init_process_group's timeout, which also bounds the wait for a rank that never starts.
    dist.distributed_c10d._set_pg_timeout(DEFAULT_GROUP_TIMEOUT, dist.group.WORLD)
    logger.info("rank %d of %d joined over %s", rank, world_size, backend)


def _control_group() -> dist.ProcessGroup:
    """Return the group for objects. The first call after the ranks have joined is collective."""
    global _control
    everyone = dist.group.WORLD
    assert everyone is not None, "initialize joins the ranks first"
    if _control is None or _control[0] is not everyone:
        _control = (everyone, dist.new_group(backend="gloo", timeout=OBJECT_TIMEOUT))
    return _control[1]


def _build_groups(layout: MegatronConfig) -> None:
    from megatron.core import parallel_state

    sizes = (layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel)
    if parallel_state.model_parallel_is_initialized():
        if sizes == (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        ):
            return
        _leave_groups(parallel_state)
    with cuda_means_cpu():
        parallel_state.initialize_model_parallel(
            layout.tensor_parallel,
            layout.pipeline_parallel,
            expert_model_parallel_size=layout.expert_parallel,
            expert_tensor_parallel_size=1,
        )


def _leave_groups(parallel_state: ModuleType) -> None:
    """Destroy Megatron's groups, which ``destroy_model_parallel`` only forgets.

    Their gloo threads would keep running, a hundred wake-ups a second each; after twenty layouts a
    rank has a thousand of them.
    """
    known = parallel_state._global_process_group_list or ()
    parallel_state.destroy_model_parallel()
    dist.barrier()  # a rank that left first would break the others' pending collectives
    for group in dict.fromkeys(known):  # equal groups are listed under several names
        if isinstance(group, dist.ProcessGroup) and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
    gc.collect()  # unused models, in reference cycles, still hold their groups
