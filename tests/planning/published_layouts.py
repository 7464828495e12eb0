"""Trainer layouts that NVIDIA publishes for H100, as numbers.

Sources: github.com/NVIDIA-NeMo/RL, examples/configs/recipes/llm/ (``source`` is the file, at commit
7ea279ab; the 8B recipe on one node at d066750c and the 70B GRPO recipe at 4987695e, later ones lack
them). What a file does not say comes from its defaults, sft.yaml, dpo.yaml and grpo_math_1B.yaml:
gradients kept and reduced in bfloat16, a distributed optimizer, Transformer Engine's
precision-aware optimizer (which we have not: planned with ours, 2 bytes / DP more per parameter,
and float32 copies of the gradients in the optimizer step). github.com/NVIDIA-NeMo/Megatron-Bridge:
scripts/performance/configs/llama/llama3_workload_base_configs.py before commit c8327cfc and
src/megatron/bridge/perf_recipes/llama/h100/llama3.py since (gradients in bfloat16), and
recipes/qwen/h100/qwen3.py (its ``bf16_mixed`` overrides ``ddp.grad_reduce_in_fp32``: gradients in
float32).
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
    """Tokens of a micro-batch on one rank."""
    batch: int
    """Sequences of one optimizer step."""
    recompute: str = "none"
    sequence_parallel: bool = True
    gradients: str = "bfloat16"
    pair: bool = False
    """True if a micro-batch is two sequences of the same maximum length."""
    quarter_fits: bool = False
    """True if the trainer also fits a quarter of the GPUs: the published number is for speed."""

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self.tokens // 2 if self.pair else self.tokens


SFT_70B = "NeMo-RL sft-llama3.1-70b-8n8g-tp4pp2-long-megatron"
LIMIT_70B = 4096
"""Maximum sequence length of the recipe, in tokens."""
LONGEST_70B = 1024 + 1024 + 128
"""Longest sequence of the recipe's data, with 128 tokens for the prompt's own text.

The authors prepare OpenMathInstruct-2 for SFT without problems and solutions above 1,024 Llama
tokens (github.com/NVIDIA/NeMo-Skills, docs/openmathinstruct2/dataset.md). As released, 564 of some
600,000 problems are longer (huggingface.co/datasets/nvidia/OpenMathInstruct-2, its note).
"""

ACCEPTED = [
    Published(
        "NeMo-RL performance/grpo-llama3.1-8b-instruct-1n8g",
        "llama-3.1-8b",
        1,
        1,
        2,
        4096,
        512,
        "full",
    ),
    Published(
        "NeMo-RL performance/grpo-llama3.1-8b-instruct-2n8g",
        "llama-3.1-8b",
        2,
        1,
        2,
        4096,
        2048,
        "full",
        quarter_fits=True,
    ),
    # train_micro_batch_size counts pairs: dpo.py passes twice as many sequences. The reference is
    # in host memory.
    Published(
        "NeMo-RL dpo-llama3.1-8b-instruct-4n8g-megatrontp2pp2-quick",
        "llama-3.1-8b",
        4,
        2,
        2,
        4096,
        512,
        pair=True,
        quarter_fits=True,
    ),
    Published("NeMo-RL performance/grpo-qwen3-32b-4n8g", "qwen3-32b", 4, 4, 4, 4096, 2048),
    Published(
        "NeMo-RL performance/grpo-llama3.3-70b-instruct-4n8g", "llama-3.1-70b", 4, 4, 8, 4096, 512
    ),
    Published(SFT_70B, "llama-3.1-70b", 8, 4, 2, LONGEST_70B, 512, "none", False),
    Published("Megatron-Bridge LLAMA3_8B_SFT_CONFIG_H100", "llama-3.1-8b", 1, 1, 1, 4096, 32),
    Published(
        "Megatron-Bridge qwen3_32b_sft_config",
        "qwen3-32b",
        2,
        8,
        2,
        2048,
        8,
        "full",
        False,
        "float32",
    ),
    Published("Megatron-Bridge LLAMA3_70B_SFT_CONFIG_H100", "llama-3.1-70b", 4, 4, 4, 4096, 32),
]
"""Megatron-Bridge's 70B runs an interleaved schedule (5 chunks per stage), which we have not:
planned without it.
"""
