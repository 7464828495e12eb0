"""Trainer layouts that NVIDIA publishes for H100, as numbers.

Sources: github.com/NVIDIA-NeMo/RL, examples/configs/recipes/llm/ (``source`` is the file; what a file does not say
comes from its defaults, as in sft.yaml: gradients reduced in bfloat16, a distributed optimizer, one sequence or one pack
of max_total_sequence_length per micro-batch; float32 optimizer states are our assumption), and
github.com/NVIDIA-NeMo/Megatron-Bridge, scripts/performance/configs/llama/llama3_workload_base_configs.py and
recipes/qwen/qwen3.py (``qwen3_32b_sft_config``).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One recipe."""

    source: str
    model: str
    nodes: int
    tensor_parallel: int
    pipeline_parallel: int
    tokens: int
    """Of a micro-batch on one rank."""
    batch: int
    """Sequences of one optimizer step."""
    recompute: str = "none"
    sequence_parallel: bool = True
    recompute_here: str | None = None
    """What this package needs besides: its gradients are summed in float32, 2 bytes more per parameter."""
    quarter_fits: bool = False
    """Fits a quarter of the GPUs, too: the published number is for speed, not for memory."""


ACCEPTED = [
    Published("NeMo-RL performance/grpo-llama3.1-8b-instruct-1n8g", "llama-3.1-8b", 1, 1, 2, 4096, 512, "full"),
    Published("NeMo-RL performance/grpo-llama3.1-8b-instruct-2n8g", "llama-3.1-8b", 2, 1, 2, 4096, 512, "full",
              quarter_fits=True),
    Published("NeMo-RL dpo-llama3.1-8b-instruct-4n8g-megatrontp2pp2-quick", "llama-3.1-8b", 4, 2, 2, 2048, 256,
              quarter_fits=True),
    Published("NeMo-RL performance/grpo-qwen3-32b-4n8g", "qwen3-32b", 4, 4, 4, 4096, 512),
    Published("NeMo-RL performance/grpo-llama3.3-70b-instruct-4n8g", "llama-3.1-70b", 4, 4, 8, 4096, 512),
    Published("Megatron-Bridge LLAMA3_8B_SFT_CONFIG_H100", "llama-3.1-8b", 1, 1, 1, 4096, 32, recompute_here="full"),
    Published("Megatron-Bridge qwen3_32b_sft_config", "qwen3-32b", 2, 8, 2, 2048, 8, "full", False),
    Published("Megatron-Bridge LLAMA3_70B_SFT_CONFIG_H100", "llama-3.1-70b", 4, 4, 4, 4096, 32,
              recompute_here="full"),
]
"""Megatron-Bridge's 70B runs an interleaved schedule (5 chunks per stage), which we have not: planned without it."""
BOUND_TOO_HIGH = Published(
    "NeMo-RL sft-llama3.1-70b-8n8g-tp4pp2-long-megatron", "llama-3.1-70b", 8, 4, 2, 4096, 512, "none", False)
"""One unpacked sequence per micro-batch: 4,096 tokens are its limit. That its data (OpenMathInstruct-2) stay below it is
our guess at why it runs."""
