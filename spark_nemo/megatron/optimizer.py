"""Megatron's AdamW and its schedule, with the corrections that exact resume needs."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.config.errors import ConfigError

from . import NonFiniteGradient
from .packed_gpt import DTYPES, PackedGPT


def wrap_for_gradients(model: PackedGPT, layout: MegatronConfig) -> DistributedDataParallel:
    """Wrap the model for data parallelism; gradients are summed over ranks at the end of a step.

    The buffers have the type ``layout.grad_reduce_dtype``.
    """
    return DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=layout.grad_reduce_dtype == "float32",
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        model,
    )


def build_optimizer(
    model: DistributedDataParallel,
    settings: OptimizerConfig,
    layout: MegatronConfig,
    total_steps: int | None,
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Build optimizer and schedule. Raises ``ConfigError`` when it needs ``total_steps``."""
    scheduled = settings.warmup_fraction > 0 or settings.decay != "constant"
    if scheduled and total_steps is None:
        raise ConfigError(
            f"optimizer.decay={settings.decay} with optimizer.warmup_fraction="
            f"{settings.warmup_fraction}: the total number of steps is missing; pass total_steps"
        )
    dtype = DTYPES[layout.dtype]
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        [model],
    )
    _make_resumable(optimizer)

    warmup = math.ceil(settings.warmup_fraction * total_steps) if scheduled else 0
    # Megatron's warm-up starts from init_lr: this value gives step k of W the learning rate
    # lr * (k + 1) / (W + 1), never zero.
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr / (warmup + 1),
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps or 1, warmup + 1),
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def set_step(scheduler: OptimizerParamScheduler, step: int) -> None:
    """Move the schedule to ``step`` and update the optimizer's learning rate and weight decay."""
    scheduler.num_steps = step
    scheduler.step(0)


def clip_and_step(optimizer: ChainedOptimizer) -> float:
    """Clip the gradients, make one optimizer step and return the norm before clipping.

    Raises ``NonFiniteGradient`` on every rank, before any change, when the norm is not finite;
    Megatron's own ``step`` would multiply every weight by NaN.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise NonFiniteGradient(f"gradient norm is {norm}: the step was not taken")
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if part.config.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    optimizer.step_with_ready_grads()
    # The float32 copies of bfloat16 gradients would otherwise stay in memory until the next step.
    optimizer.zero_grad()
    return norm


def prime_state(optimizer: ChainedOptimizer) -> None:
    """Allocate the state that torch AdamW makes in its first step, to load a checkpoint into it."""
    for inner in _torch_adamw(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


@contextmanager
def padding_counted(optimizer: ChainedOptimizer) -> Iterator[None]:
    """Count the padding between buckets while a distributed optimizer's state is described.

    megatron-core 0.16.1 gathers the state without the padding at the end of each bucket, then cuts
    the parameters out at their places in the padded buffer. After a padded bucket (a tied output
    layer on the last stage has its own) it would save every parameter's state shifted, silently.
    """
    parts = [
        part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)
    ]
    buffers = [buffer for part in parts for buffer in part.buffers]
    owners = [
        (owner, size)
        for buffer in buffers
        for owner, size in (
            (buffer, buffer.numel),
            *((x, x.grad_data.numel()) for x in buffer.buckets),
        )
    ]
    unpadded = [owner.numel_unpadded for owner, _ in owners]
    try:
        for owner, size in owners:
            owner.numel_unpadded = size
        yield
    finally:
        for (owner, _), size in zip(owners, unpadded, strict=True):
            owner.numel_unpadded = size


def separate_steps(optimizer: ChainedOptimizer) -> None:
    """Give each parameter its own step counter.

    Megatron loads one counter shared by all, which AdamW would advance once per parameter.
    """
    for inner in _torch_adamw(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].clone()


def _torch_adamw(optimizer: ChainedOptimizer) -> list[torch.optim.AdamW]:
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [x for x in inner if isinstance(x, torch.optim.AdamW)]


def _make_resumable(optimizer: ChainedOptimizer) -> None:
    """Replace a method with which the distributed optimizer cannot read its own checkpoint.

    Without Transformer Engine it fails with KeyError: 'step'.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW):
            part._set_main_param_and_optimizer_states = types.MethodType(
                _set_state_without_step, part
            )


def _set_state_without_step(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    target = {"param": main_param, **self.optimizer.state[main_param]}
    with torch.no_grad():
        for key in ("param", "exp_avg", "exp_avg_sq"):
            target[key].copy_(tensors[key])
