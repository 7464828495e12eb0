"""The numbers of a config.json that decide the names and shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spark_nemo.config import ConfigError

FAMILIES = ("qwen2", "qwen3", "llama", "qwen3_moe")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """Sizes of a decoder. ``qkv_bias``: Qwen2's biases; ``qk_norm``: Qwen3's norms of every q and k
    head.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    experts: int = 0
    """Experts of every layer, which then has no other feed-forward network; 0: dense, of
    ``ffn_size``.
    """
    expert_ffn_size: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelNumbers:
        """Read them. ``ConfigError`` for another family, or a part of a model that no slice is
        known for.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ConfigError(
                f"{source}: model_type={family!r} has no weight-sync plan, only {', '.join(FAMILIES)}"
            )
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise ConfigError(f"{source}: {name}=true has no weight-sync plan")
        heads = config["num_attention_heads"]
        experts, expert_ffn = _experts(config, source) if family == "qwen3_moe" else (0, 0)
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            experts=experts,
            expert_ffn_size=expert_ffn,
        )

    @property
    def q_rows(self) -> int:
        """Rows of q_proj: heads x head_dim, which is not always the hidden size."""
        return self.num_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_kv_heads * self.head_dim


def _experts(config: Mapping[str, Any], source: str) -> tuple[int, int]:
    """Number and width of Qwen3-MoE's experts."""
    for name, only in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if config.get(name) not in (None, only):
            raise ConfigError(
                f"{source}: {name}={config[name]} has no weight-sync plan: every layer must have experts"
            )
    if config.get("tie_word_embeddings"):
        # srt/models/qwen3_moe.py makes a head of its own and reads it from the checkpoint, which
        # has none.
        raise ConfigError(
            f"{source}: tie_word_embeddings=true with experts has no weight-sync plan: SGLang 0.5.21 "
            "does not tie the head of a Qwen3-MoE; save the model with a head of its own"
        )
    # transformers 5 writes num_local_experts, 4 and the hub num_experts.
    count = config.get("num_local_experts", config.get("num_experts"))
    if not count or not config.get("moe_intermediate_size"):
        raise ConfigError(
            f"{source}: num_experts={count} and moe_intermediate_size="
            f"{config.get('moe_intermediate_size')} must both be set for model_type=qwen3_moe"
        )
    return count, config["moe_intermediate_size"]


def checkpoint_tensors(numbers: ModelNumbers) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face checkpoint, in the order in which the trainer exports
    them.
    """
    hidden, q, kv, ffn = numbers.hidden_size, numbers.q_rows, numbers.kv_rows, numbers.ffn_size
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    layer |= {
        f"self_attn.{x}_proj.weight": (rows, hidden) for x, rows in (("q", q), ("k", kv), ("v", kv))
    }
    if numbers.qkv_bias:
        layer |= {
            f"self_attn.{x}_proj.bias": (rows,) for x, rows in (("q", q), ("k", kv), ("v", kv))
        }
    if numbers.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (numbers.head_dim,) for x in "qk"}
    layer |= {
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
    }
    if numbers.experts:
        layer["mlp.gate.weight"] = (numbers.experts, hidden)
        ffn = numbers.expert_ffn_size
    for mlp in [f"mlp.experts.{expert}." for expert in range(numbers.experts)] or ["mlp."]:
        layer |= {
            f"{mlp}gate_proj.weight": (ffn, hidden),
            f"{mlp}up_proj.weight": (ffn, hidden),
            f"{mlp}down_proj.weight": (hidden, ffn),
        }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (numbers.vocab_size, hidden)}
    for index in range(numbers.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not numbers.tied:
        shapes["lm_head.weight"] = (numbers.vocab_size, hidden)
    return shapes
