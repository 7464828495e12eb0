"""The sizes of a Hugging Face model, checked, and checked against a parallel layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import ConfigError, without_effect

from .families import Experts, Family, RopeScaling, family_of


@dataclass(frozen=True)
class ModelShape:
    """What config.json says about a decoder-only model."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    """Width of the feed-forward network; of models with experts, what config.json says and no
    tensor has.
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
    experts: Experts | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> ModelShape:
        """Read a Hugging Face configuration. ``ConfigError`` for a missing or impossible value, or
        a feature that we would ignore.
        """

        def get(key: str) -> Any:
            if config.get(key) is None:
                raise ConfigError(
                    f"{source} has no {key!r}: is this a Hugging Face language model?"
                )
            return config[key]

        def count(key: str, default: int | None = None) -> int:
            value = get(key) if default is None or config.get(key) is not None else default
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{source}: {key}={value!r} must be a positive whole number")
            return value

        def number(key: str, default: float) -> float:
            return _number(config[key], key, source) if config.get(key) is not None else default

        family = family_of(get("model_type"), source)
        _refuse_features(family, config, source)
        for key in family.required:
            get(key)
        heads = count("num_attention_heads")
        kv_heads = count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"{source}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}"
            )
        theta, scaling = _rope(family, config, source)
        try:
            experts = None if family.experts is None else family.experts(config, get)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{source}: {error}") from error
        hidden, tied = count("hidden_size"), config.get("tie_word_embeddings")
        if tied not in (None, True, False):
            raise ConfigError(f"{source}: tie_word_embeddings={tied!r} must be true or false")
        return cls(
            num_layers=count("num_hidden_layers"),
            hidden_size=hidden,
            ffn_size=count("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=count("head_dim", hidden // heads),
            vocab_size=count("vocab_size"),
            tied_embeddings=bool(tied),
            norm_eps=number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            max_positions=count("max_position_embeddings", 32768),
            init_std=number("initializer_range", 0.02),
            family=family.model_type,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            rope_scaling=scaling,
            experts=experts,
        )

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding after padding to a multiple of ``tensor_parallel``."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    def check_layout(self, layout: MegatronConfig) -> None:
        """Raise ``ConfigError`` unless the model can be split as ``layout`` says."""
        kv, feed_forward = (
            self.num_kv_heads,
            "" if self.experts else f", ffn size {self.ffn_size} (mlp.gate_proj)",
        )

        def splits(tp: int) -> bool:
            return (
                self.num_heads % tp == 0
                and (kv % tp == 0 or tp % kv == 0)
                and (self.num_heads + 2 * kv) * self.head_dim % tp == 0
                and (self.experts is not None or self.ffn_size % tp == 0)
                and self.vocab_size >= tp * tp
            )

        _check_divisor(
            "megatron.tensor_parallel",
            layout.tensor_parallel,
            splits,
            f"{self.num_heads} attention heads (self_attn.q_proj), {kv} key-value heads (self_attn.k_proj; a multiple "
            f"of them will do){feed_forward}",
        )
        _check_divisor(
            "megatron.pipeline_parallel",
            layout.pipeline_parallel,
            lambda pp: self.num_layers % pp == 0,
            f"{self.num_layers} layers",
        )
        self._check_experts(layout)

    def _check_experts(self, layout: MegatronConfig) -> None:
        name, ep = "megatron.expert_parallel", layout.expert_parallel
        if self.experts is None:
            if ep > 1:
                raise without_effect(
                    name, ep, f"for model_type={self.family}, which has no experts"
                )
            return
        _check_divisor(
            name, ep, lambda n: self.experts.count % n == 0, f"{self.experts.count} experts"
        )
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


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model folder. ``ConfigError`` when the folder or the file is missing or
    is not JSON.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConfigError(f"model folder {folder} is a file: name its folder")
    if not folder.is_dir():
        raise ConfigError(
            f"model folder {folder} does not exist (hub names are not downloaded: "
            "hf download NAME --local-dir FOLDER)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model folder {folder} has no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # also for bytes that are no text
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not a model's settings")
    return config


def check_fetched(path: Path) -> None:
    """``ConfigError`` for the few lines that git leaves in place of a large file where git-lfs is
    not installed.
    """
    with path.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise ConfigError(
                f"{path} is a Git LFS pointer, not the file: git lfs pull in its folder, or hf download"
            )


def _check_divisor(name: str, value: int, allowed: Callable[[int], bool], what: str) -> None:
    if not allowed(value):
        choices = ", ".join(str(n) for n in range(1, 129) if allowed(n))
        raise ConfigError(
            f"{name}={value} does not divide the model's {what}: choose one of {choices}"
        )


def _refuse_features(family: Family, config: dict[str, Any], source: str) -> None:
    """Whatever would change the numbers and is not computed here is an error, not a difference
    found later.
    """
    if isinstance(quantized := config.get("quantization_config"), dict):
        raise ConfigError(
            f"{source}: quantization_config with quant_method={quantized.get('quant_method')!r} is not "
            "supported, only unquantized weights: use the model's bfloat16 release"
        )
    for key, supported in family.only.items():
        if config.get(key) not in (None, supported):
            raise ConfigError(
                f"{source}: {key}={config[key]!r} is not supported for {family.model_type}, only "
                f"{supported!r}"
            )
    layers = config.get("layer_types") or []
    if not isinstance(layers, list):
        raise ConfigError(f"{source}: layer_types={layers!r} is no list")
    if kinds := [kind for kind in layers if kind != "full_attention"]:
        raise ConfigError(
            f"{source}: layer_types has {kinds[0]!r}, which is not supported, only 'full_attention'"
        )


def _rope(family: Family, config: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Base and stretch of the rotary frequencies; transformers 4 writes rope_scaling, 5
    rope_parameters.
    """
    name, rope = _rope_settings(config, source)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.rope_types:
        raise ConfigError(
            f"{source}: rope type {kind!r} is not supported for {family.model_type}, only "
            f"{', '.join(map(repr, family.rope_types))}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{source}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only 1.0"
        )
    stated = [
        _number(x["rope_theta"], "rope_theta", source)
        for x in (rope, config)
        if x.get("rope_theta") is not None
    ]
    theta = stated[0] if stated else 10000.0
    if len(set(stated)) > 1:
        raise ConfigError(
            f"{source}: rope_theta={stated[1]}, but {name} says {theta}, which transformers 5 takes and "
            "4 does not: remove the wrong one"
        )
    if kind == "default":
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if rope.get(key) is None]:
        raise ConfigError(f"{source}: rope type 'llama3' lacks {missing[0]!r}")
    try:
        return theta, RopeScaling(*(rope[key] for key in keys))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def _rope_settings(config: dict[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """Name and content of what config.json has of rope_parameters and rope_scaling. Of two
    transformers 5 takes rope_scaling, whose base is then the outer rope_theta or 10000, and 4 knows
    no other: they have to say the same.
    """
    found = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    for key, value in found.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: {key}={value!r} is no set of settings")
    one, *other = (
        {"rope_theta": config.get("rope_theta"), **value} for value in found.values() or [{}]
    )
    if other and one != other[0]:
        raise ConfigError(
            f"{source} has rope_parameters and rope_scaling, which differ: keep one, with everything it "
            "shall say (rope_theta too)"
        )
    return next(iter(found.items()), ("rope_parameters", {}))


def _number(value: Any, key: str, source: str) -> float:
    least = (
        0 if key == "initializer_range" else 1e-30
    )  # of stored weights nobody asks how they were drawn
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value < math.inf
    ):
        raise ConfigError(f"{source}: {key}={value!r} must be a positive number")
    return float(value)
