"""Sizes and features of a decoder-only model, read from a Hugging Face config.json and validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import ConfigError, without_effect

from .families import Family, find_family
from .hf_config import positive_float, positive_int, require


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (rope_type "llama3"); ``megatron/rope.py`` has
    the formula.
    """

    factor: float
    """Divisor of the low frequencies."""
    low_freq_factor: float
    """Wavelengths above ``original_max_positions / low_freq_factor`` are scaled fully."""
    high_freq_factor: float
    """Wavelengths below ``original_max_positions / high_freq_factor`` are not scaled."""
    original_max_positions: int
    """Context length before scaling."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.low_freq_factor <= 0 or self.original_max_positions < 1:
            raise ValueError(f"rope scaling {self}: factor is at least 1, the others are positive")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True)
class ExpertSpec:
    """Mixture of experts, which replaces the feed-forward network of every layer."""

    count: int
    """Experts per layer."""
    per_token: int
    """Experts that process a token."""
    ffn_size: int
    """Width of one expert."""
    normalize_weights: bool
    """Divide the weights of a token's experts by their sum (``norm_topk_prob``)."""

    def __post_init__(self) -> None:
        sizes = (self.count, self.per_token, self.ffn_size)
        is_valid = (
            all(isinstance(size, int) for size in sizes)
            and 0 < self.per_token <= self.count
            and self.ffn_size >= 1
        )
        if not is_valid:
            raise ValueError(
                f"num_experts={self.count!r}, num_experts_per_tok={self.per_token!r}, "
                f"moe_intermediate_size={self.ffn_size!r}: a token needs at least one expert and at "
                "most all, each with a width"
            )
        if not isinstance(self.normalize_weights, bool):
            raise ValueError(f"norm_topk_prob={self.normalize_weights!r} must be true or false")


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and features of a decoder-only model."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    """Width of the feed-forward network. With experts config.json still states it, but no tensor
    has it.
    """
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    norm_eps: float
    rope_theta: float
    max_positions: int
    init_std: float
    family: str = "qwen2"
    """config.json's model_type, a key of ``families.FAMILIES``."""
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    experts: ExpertSpec | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelSpec:
        """Read a Hugging Face configuration.

        Raises ``ConfigError`` for a missing or impossible value, and for a feature that this package
        does not compute: ignoring it would train another model than the one in the folder.
        """
        family = find_family(require(config, "model_type", source), source)
        _reject_unsupported(family, config, source)
        for key in family.required_keys:
            require(config, key, source)
        hidden_size = positive_int(config, "hidden_size", source)
        num_heads = positive_int(config, "num_attention_heads", source)
        num_kv_heads = positive_int(config, "num_key_value_heads", source, num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source}: num_key_value_heads={num_kv_heads} does not divide "
                f"num_attention_heads={num_heads}"
            )
        rope_theta, rope_scaling = _read_rope(family, config, source)
        return cls(
            num_layers=positive_int(config, "num_hidden_layers", source),
            hidden_size=hidden_size,
            ffn_size=positive_int(config, "intermediate_size", source),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=positive_int(config, "head_dim", source, hidden_size // num_heads),
            vocab_size=positive_int(config, "vocab_size", source),
            tied_embeddings=_read_tied(config, source),
            norm_eps=positive_float(config, "rms_norm_eps", source, 1e-6),
            rope_theta=rope_theta,
            max_positions=positive_int(config, "max_position_embeddings", source, 32768),
            # Loaded weights do not depend on it, so 0 is fine.
            init_std=positive_float(config, "initializer_range", source, 0.02, zero_allowed=True),
            family=family.model_type,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            rope_scaling=rope_scaling,
            experts=_read_experts(config, source) if family.has_experts else None,
        )

    @property
    def q_rows(self) -> int:
        """Rows of q_proj. They may differ from the hidden size."""
        return self.num_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_kv_heads * self.head_dim

    def padded_vocab_size(self, multiple: int) -> int:
        """Return the rows of the embedding after padding to a multiple of ``multiple``."""
        return -(-self.vocab_size // multiple) * multiple

    def check_layout(self, layout: MegatronConfig) -> None:
        """Raise ``ConfigError`` unless Megatron can split the model by ``layout``."""
        feed_forward = "" if self.experts else f", ffn size {self.ffn_size} (mlp.gate_proj)"
        _check_divisor(
            "megatron.tensor_parallel",
            layout.tensor_parallel,
            self._divides_over_tensor_ranks,
            f"{self.num_heads} attention heads (self_attn.q_proj), {self.num_kv_heads} key-value heads "
            f"(self_attn.k_proj; a multiple of them is fine){feed_forward}",
        )
        _check_divisor(
            "megatron.pipeline_parallel",
            layout.pipeline_parallel,
            lambda pp: self.num_layers % pp == 0,
            f"{self.num_layers} layers",
        )
        self._check_expert_layout(layout)

    def _divides_over_tensor_ranks(self, tp: int) -> bool:
        kv_heads = self.num_kv_heads
        return (
            self.num_heads % tp == 0
            and (kv_heads % tp == 0 or tp % kv_heads == 0)
            and (self.q_rows + 2 * self.kv_rows) % tp == 0
            and (self.experts is not None or self.ffn_size % tp == 0)
            # Padding to a multiple of tp must leave every rank at least one real row.
            and self.vocab_size >= tp * tp
        )

    def _check_expert_layout(self, layout: MegatronConfig) -> None:
        name = "megatron.expert_parallel"
        ep = layout.expert_parallel
        experts = self.experts
        if experts is None:
            if ep > 1:
                raise without_effect(
                    name, ep, f"for model_type={self.family}, which has no experts"
                )
            return
        _check_divisor(name, ep, lambda n: experts.count % n == 0, f"{experts.count} experts")
        ranks = layout.tensor_parallel * layout.data_parallel
        if ranks % ep:
            raise ConfigError(
                f"{name}={ep} does not divide megatron.tensor_parallel x data_parallel = {ranks}: "
                "experts are spread over those ranks"
            )
        if layout.tensor_parallel > 1 and not layout.sequence_parallel:
            raise ConfigError(
                f"megatron.tensor_parallel={layout.tensor_parallel} with experts needs "
                "megatron.sequence_parallel=true: otherwise every tensor rank would compute all tokens"
            )


def _check_divisor(name: str, value: int, is_allowed: Callable[[int], bool], what: str) -> None:
    if not is_allowed(value):
        choices = ", ".join(str(n) for n in range(1, 129) if is_allowed(n))
        raise ConfigError(
            f"{name}={value} does not divide the model's {what}: choose one of {choices}"
        )


def _reject_unsupported(family: Family, config: Mapping[str, Any], source: str) -> None:
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        raise ConfigError(
            f"{source}: quantization_config with quant_method={quantization.get('quant_method')!r} is "
            "not supported, only unquantized weights: use the model's bfloat16 release"
        )
    for key, supported in family.supported_values.items():
        if config.get(key) not in (None, supported):
            raise ConfigError(
                f"{source}: {key}={config[key]!r} is not supported for {family.model_type}, only "
                f"{supported!r}"
            )
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ConfigError(f"{source}: layer_types={layer_types!r} is not a list")
    for layer_type in layer_types:
        if layer_type != "full_attention":
            raise ConfigError(
                f"{source}: layer_types has {layer_type!r}, which is not supported, only "
                "'full_attention'"
            )


def _read_tied(config: Mapping[str, Any], source: str) -> bool:
    tied = config.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise ConfigError(f"{source}: tie_word_embeddings={tied!r} must be true or false")
    return bool(tied)


def _read_experts(config: Mapping[str, Any], source: str) -> ExpertSpec:
    # transformers 5 writes num_local_experts; transformers 4 and the hub num_experts.
    new_key = config.get("num_local_experts") is not None
    count = require(config, "num_local_experts" if new_key else "num_experts", source)
    per_token = require(config, "num_experts_per_tok", source)
    ffn_size = require(config, "moe_intermediate_size", source)
    normalize_weights = require(config, "norm_topk_prob", source)
    try:
        return ExpertSpec(count, per_token, ffn_size, normalize_weights)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def _read_rope(
    family: Family, config: Mapping[str, Any], source: str
) -> tuple[float, RopeScaling | None]:
    """Return the base and the scaling of the rotary frequencies."""
    name, rope = _rope_settings(config, source)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.rope_types:
        raise ConfigError(
            f"{source}: rope type {kind!r} is not supported for {family.model_type}, only "
            f"{', '.join(map(repr, family.rope_types))}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{source}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only "
            "1.0"
        )
    outer_theta = positive_float(config, "rope_theta", source, 10000.0)
    theta = positive_float(rope, "rope_theta", source, outer_theta)
    if theta != outer_theta and config.get("rope_theta") is not None:
        raise ConfigError(
            f"{source}: rope_theta={outer_theta}, but {name} says {theta}; transformers 5 uses the "
            "second and 4 the first: remove the wrong one"
        )
    if kind == "default":
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for key in keys:
        if rope.get(key) is None:
            raise ConfigError(f"{source}: rope type 'llama3' lacks {key!r}")
    try:
        return theta, RopeScaling(*(rope[key] for key in keys))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def _rope_settings(config: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """Return the name and content of rope_parameters (transformers 5) or rope_scaling (4).

    If both are present they must agree: transformers 5 prefers rope_scaling, and its base is then
    the outer rope_theta or 10000; transformers 4 reads nothing but rope_scaling.
    """
    found = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    for key, value in found.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: {key}={value!r} is not a set of settings")
    if not found:
        return "rope_parameters", {}
    outer_theta = {"rope_theta": config.get("rope_theta")}
    first, *others = [outer_theta | value for value in found.values()]
    if others and others[0] != first:
        raise ConfigError(
            f"{source} has rope_parameters and rope_scaling, which differ: keep one, with all its "
            "settings (rope_theta too)"
        )
    return next(iter(found.items()))
