"""The sizes of a Hugging Face model, checked, and checked against a parallel layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import ConfigError

MODEL_TYPES = ("qwen2",)


@dataclass(frozen=True)
class ModelShape:
    """What config.json says about a decoder-only model."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    norm_eps: float
    rope_theta: float
    max_positions: int
    init_std: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> ModelShape:
        """Read a Hugging Face configuration. ``ConfigError`` for a missing key or a feature we would ignore."""

        def get(key: str) -> Any:
            if key not in config:
                raise ConfigError(f"{source} has no {key!r}: is this a Hugging Face language model?")
            return config[key]

        if get("model_type") not in MODEL_TYPES:
            raise ConfigError(f"{source}: model_type={config['model_type']!r} is not supported, only "
                              f"{', '.join(MODEL_TYPES)} (add its tensors to megatron/hf_weights.py)")
        if config.get("use_sliding_window"):
            raise ConfigError(f"{source}: use_sliding_window=true is not supported: set it to false")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ConfigError(f"{source}: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported, "
                              "only 'default'")
        heads = get("num_attention_heads")
        return cls(
            num_layers=get("num_hidden_layers"), hidden_size=get("hidden_size"), ffn_size=get("intermediate_size"),
            num_heads=heads, num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or get("hidden_size") // heads, vocab_size=get("vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            max_positions=config.get("max_position_embeddings", 32768),
            init_std=config.get("initializer_range", 0.02))

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding after padding to a multiple of ``tensor_parallel``."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    def check_layout(self, layout: MegatronConfig) -> None:
        """Raise ``ConfigError`` unless the model can be split as ``layout`` says."""

        def splits_heads(tp: int) -> bool:
            return (self.num_heads % tp == 0 and self.num_kv_heads % tp == 0 and self.ffn_size % tp == 0
                    and self.vocab_size >= tp * tp)

        _check_divisor(
            "megatron.tensor_parallel", layout.tensor_parallel, splits_heads,
            f"{self.num_heads} attention heads, {self.num_kv_heads} key-value heads and ffn size {self.ffn_size}")
        _check_divisor(
            "megatron.pipeline_parallel", layout.pipeline_parallel, lambda pp: self.num_layers % pp == 0,
            f"{self.num_layers} layers")


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model folder. ``ConfigError`` when the folder or the file is missing or is not JSON."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"model folder {folder} does not exist")
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model folder {folder} has no config.json")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def _check_divisor(name: str, value: int, allowed: Callable[[int], bool], what: str) -> None:
    if not allowed(value):
        choices = ", ".join(str(n) for n in range(1, 129) if allowed(n))
        raise ConfigError(f"{name}={value} does not divide the model's {what}: choose one of {choices}")
