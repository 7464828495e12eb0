"""Supported model families: features that config.json does not state, and its supported values.

To add a family, add a ``Family`` to ``FAMILIES``; ``param_mapping.py`` holds the tensors that the
families share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spark_nemo.config.errors import ConfigError

SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
"""Settings of config.json with the only supported value; they may be absent."""


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of config.json."""

    model_type: str
    qkv_bias: bool = False
    """Biases on q, k and v."""
    qk_norm: bool = False
    """An RMS norm over every query and key head."""
    has_experts: bool = False
    """A router and experts in every layer."""
    rope_types: tuple[str, ...] = ("default",)
    """Supported types of rotary embedding."""
    supported_values: Mapping[str, Any] = field(default_factory=lambda: SUPPORTED_VALUES)
    required_keys: tuple[str, ...] = ()
    """Keys of config.json without a default that all readers of the file share."""


_ALL_FAMILIES = (
    # Qwen2, Qwen2.5, Qwen2.5-Math.
    Family("qwen2", qkv_bias=True),
    # Qwen3, dense. For a missing head_dim transformers takes 128, other readers
    # hidden_size / num_attention_heads.
    Family("qwen3", qk_norm=True, required_keys=("head_dim",)),
    # Llama 2 and 3.x; from 3.1 on with scaled rotary frequencies.
    Family("llama", rope_types=("default", "llama3")),
    # Qwen3-30B-A3B and larger. Layers without experts between the others would need a second set of
    # layer rules.
    Family(
        "qwen3_moe",
        qk_norm=True,
        has_experts=True,
        supported_values=SUPPORTED_VALUES | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
)
FAMILIES = {family.model_type: family for family in _ALL_FAMILIES}


def find_family(model_type: Any, source: str) -> Family:
    """Return the family of a config.json's ``model_type``. Raises ``ConfigError`` if unsupported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type={model_type!r} is not supported, only {', '.join(FAMILIES)} "
            "(docs/families.md explains how to add one)"
        )
    return FAMILIES[model_type]
