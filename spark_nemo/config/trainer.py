"""The Megatron trainer: parallel layout, numerics, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError, at_least, in_unit_interval, one_of, without_effect


@dataclass
class MegatronConfig:
    """Parallel layout and numerics of every Megatron model in the run."""

    tensor_parallel: int = 1
    """Ranks that share each layer's weights."""
    pipeline_parallel: int = 1
    """Pipeline stages."""
    data_parallel: int = 1
    """Replicas of the model; the number of ranks is the product of the three sizes."""
    expert_parallel: int = 1
    """Ranks among which a layer's experts are divided, out of the tensor-parallel x data-parallel
    ranks of a pipeline stage. A single expert is never split.
    """
    sequence_parallel: bool = False
    """Split activations outside the tensor-parallel layers along the sequence."""
    dtype: str = "bfloat16"
    """Data type of parameters and activations: ``bfloat16`` or ``float32``."""
    grad_reduce_dtype: str = "float32"
    """Data type in which gradients are summed over micro-batches and ranks. bfloat16 (only with
    dtype bfloat16) saves 2 bytes per parameter and half the traffic, but rounds every addition to
    8 bits.
    """
    recompute_granularity: str = "none"
    """Activations to recompute in the backward pass: ``none``, ``selective`` (MLP or experts) or
    ``full`` (a whole layer except its input).
    """
    distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    tokens_per_micro_batch: int = 8192
    """Maximum packed tokens per micro-batch; a longer sequence gets a micro-batch of its own."""

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
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Maximum norm of the gradient; 0 disables clipping."""
    warmup_fraction: float = 0.0
    """Share of all optimizer steps spent on linear warm-up."""
    decay: str = "constant"
    """Decay from the end of warm-up to the last step: ``constant``, ``linear`` or ``cosine``."""

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
                f"optimizer.min_lr={self.min_lr}: at most optimizer.lr={self.lr}, "
                "from which it decays"
            )
        if self.decay == "constant" and self.min_lr:
            raise without_effect("optimizer.min_lr", self.min_lr, "with optimizer.decay=constant")
