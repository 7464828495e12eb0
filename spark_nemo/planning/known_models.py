"""config.json of the recipes' models, so that a recipe is checked before 100 GB are downloaded.

Layers, widths, heads and vocabulary equal the files in ``tests/weight_sync/shapes``, which name
their sources (a test compares). A fine-tuned model has its base's. Sources of the contexts:

* Qwen2.5-*-Instruct, 32,768: github.com/QwenLM/Qwen3 issue 1133 ("the config says 32k"), and its
  model card's section on long texts.
* Qwen2.5-Math-7B, 4,096 and the sizes of Qwen2.5-7B: the config.json quoted in
  github.com/huggingface/open-r1 issue 444 and deepseek-ai/DeepSeek-R1 issue 458 (the Instruct
  model's), github.com/QwenLM/Qwen2.5-Math issue 59 (the limit).
* Qwen2.5-Math-72B: no copy of its config.json was found; Qwen2.5-72B's sizes with the family's
  4,096.
* Qwen3-32B, 40,960: github.com/MiroMindAI/MiroTrain issue 5.
* Llama-3.1-70B, 131,072: a family value, quoted with the 8B's config.json in
  huggingface/text-generation-inference issue 3158.
"""

from __future__ import annotations

from typing import Any


def _config(
    model_type: str,
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    vocabulary: int,
    context: int,
    kv_heads: int = 8,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-14B-Instruct": _config("qwen2", 48, 5120, 40, 13824, 152064, 32768),
    "Qwen2.5-72B-Instruct": _config("qwen2", 80, 8192, 64, 29568, 152064, 32768),
    "Qwen2.5-Math-7B": _config("qwen2", 28, 3584, 28, 18944, 152064, 4096, kv_heads=4),
    "Qwen2.5-Math-72B": _config("qwen2", 80, 8192, 64, 29568, 152064, 4096),
    "Qwen3-32B": {**_config("qwen3", 64, 5120, 64, 25600, 151936, 40960), "head_dim": 128},
    "Llama-3.1-70B": _config("llama", 80, 8192, 64, 28672, 128256, 131072),
    "Llama-3.1-70B-Instruct": _config("llama", 80, 8192, 64, 28672, 128256, 131072),
}
"""By folder name."""
BASES = {
    "Qwen2.5-14B-Instruct": "qwen2.5-14b",
    "Qwen2.5-72B-Instruct": "qwen2.5-72b",
    "Qwen2.5-Math-7B": "qwen2.5-7b",
    "Qwen2.5-Math-72B": "qwen2.5-72b",
    "Qwen3-32B": "qwen3-32b",
    "Llama-3.1-70B": "llama-3.1-70b",
    "Llama-3.1-70B-Instruct": "llama-3.1-70b",
}
"""The model in ``tests/weight_sync/shapes`` whose sizes each one shares."""
