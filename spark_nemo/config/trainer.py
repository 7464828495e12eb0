"""The Megatron trainer: parallel layout, numerics, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError, at_least, in_unit_interval, one_of, without_effect


@dataclass
class MegatronConfig:
    """Parallel layout and numerics of every Megatron model in the run. Data parallel is what the
    ranks leave over.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    """Ranks that share out the experts of a layer, out of the tensor-parallel x data-parallel ones
    of a stage. An expert itself is never cut.
    """
    sequence_parallel: bool = False
    dtype: str = "bfloat16"
    grad_reduce_dtype: str = "float32"
    """What gradients are summed in, over micro-batches and ranks. bfloat16 (only with dtype
    bfloat16) takes 2 bytes per parameter less and sends half as much, and every addition rounds to
    8 bits.
    """
    recompute_granularity: str = "none"
    """Activations computed again in the backward pass: none, selective (those of the MLP or of the
    experts) or full (all of a layer but its input).
    """
    distributed_optimizer: bool = True
    tokens_per_micro_batch: int = 8192
    """Packed tokens per micro-batch; a longer sequence gets a micro-batch of its own."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_parallel",
            "pipeline_parallel",
            "data_parallel",
            "expert_parallel",
            "tokens_per_micro_batch",
        ):
            at_least(f"megatron.{name}", getattr(self, name), 1)
        one_of("megatron.dtype", self.dtype, {"float32", "bfloat16"})
        one_of("megatron.grad_reduce_dtype", self.grad_reduce_dtype, {"float32", "bfloat16"})
        one_of(
            "megatron.recompute_granularity",
            self.recompute_granularity,
            {"none", "selective", "full"},
        )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise without_effect(
                "megatron.sequence_parallel", True, "with megatron.tensor_parallel=1"
            )
        if self.grad_reduce_dtype == "bfloat16" and self.dtype == "float32":
            raise without_effect(
                "megatron.grad_reduce_dtype", "bfloat16", "with megatron.dtype=float32"
            )

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and an optional decay."""

    lr: float = 1e-5
    min_lr: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 clips nothing."""
    warmup_fraction: float = 0.0
    """Share of all optimizer steps spent on linear warm-up."""
    decay: str = "constant"
    """constant, linear or cosine, from the end of warm-up to the last step."""

    def __post_init__(self) -> None:
        one_of("optimizer.decay", self.decay, {"constant", "linear", "cosine"})
        in_unit_interval("optimizer.warmup_fraction", self.warmup_fraction)
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)}: must be positive and finite"
                )
        for name in ("min_lr", "weight_decay", "clip_grad"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: must lie in [0, 1)")
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optimizer.min_lr={self.min_lr}: at most optimizer.lr={self.lr}, from which it decays"
            )
        if self.decay == "constant" and self.min_lr:
            raise without_effect("optimizer.min_lr", self.min_lr, "with optimizer.decay=constant")
