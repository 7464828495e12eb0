"""The cluster and the rates that estimates assume. No default is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spark_nemo.config import ConfigError
from spark_nemo.config.errors import at_least

GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int = 8
    gpu_memory_gb: float = 84.9
    """10^9 bytes of one GPU as CUDA reports them: 79.10 GiB on an H100 sold as 80 GB.

    PyTorch's out-of-memory errors name this figure; nvidia-smi shows 81,559 MiB, 85.5
    (github.com/modal-labs/modal-client/pull/2797).
    """
    reserve: float = 0.1
    """Share of a GPU's memory for the CUDA context, NCCL's buffers, the kernels' workspaces and the
    allocator's fragmentation, which are not counted. Assumed.
    """

    def __post_init__(self) -> None:
        at_least("--nodes", self.nodes, 1)
        at_least("--gpus-per-node", self.gpus_per_node, 1)
        if not 0 < self.gpu_memory_gb < math.inf:
            raise ConfigError(f"--gpu-memory-gb {self.gpu_memory_gb}: must be positive and finite")
        if not 0 <= self.reserve < 1:
            raise ConfigError(f"--reserve {self.reserve}: a share of the memory, in [0, 1)")

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> int:
        """Bytes of one GPU without the reserve."""
        return int(self.gpu_memory_gb * GB * (1 - self.reserve))


@dataclass(frozen=True)
class Rates:
    """Achieved rates, not the data sheet's. The defaults are guesses for H100 SXM in bfloat16."""

    train_tflops: float = 400.0
    """Per GPU in matrix products of a training step: 40 % of 989."""
    prefill_tflops: float = 400.0
    """Per GPU while an engine reads prompts."""
    memory_gbs: float = 2000.0
    """GB/s of a GPU's memory in decoding and in the optimizer: 60 % of 3,350."""
    nvlink_gbs: float = 300.0
    """GB/s and direction between GPUs of a node: two thirds of 450."""
    network_gbs: float = 40.0
    """GB/s and GPU between nodes: 80 % of 400 Gbit/s."""
    collective_us: float = 15.0
    """Microseconds of one small all-reduce between GPUs of a node, of which decoding needs two per
    layer and token.
    """
    disk_gbs: float = 2.0
    """GB/s of the file system that all nodes share."""
    mean_length: float = 0.5
    """Mean length of generated and trained texts as a share of their limit."""
    kv_share: float = 0.85
    """Share of a GPU's memory that an engine takes for weights and KV cache (SGLang's
    --mem-fraction-static).
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value}: must be positive and finite"
                )
        for name in ("mean_length", "kv_share"):
            if getattr(self, name) > 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: a share, at most 1"
                )
