"""Contents of Megatron's distributed checkpoint (torch_dist): keys, shapes, parameters' places.

Its tensors do not depend on parallel ranks: the tensors of all layers are stacked under one key,
experts on a second axis. Names are Transformer Engine's, which Megatron writes for its local layers
too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from spark_nemo.config.errors import ConfigError
from spark_nemo.models.param_mapping import MappedParam, map_params
from spark_nemo.models.spec import ModelSpec

_IN_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_IN_EXPERT = re.compile(r"^mlp\.experts\.(linear_fc[12]\.weight)(\d+)$")


@dataclass(frozen=True)
class Piece:
    """One Megatron parameter and its box in the stacked tensor ``key``."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    param: MappedParam


@dataclass(frozen=True)
class GlobalTensors:
    """The weight tensors of a model, in Hugging Face order, and the empty objects they need."""

    shapes: dict[str, tuple[int, ...]]
    pieces: list[Piece]
    extra_states: list[str]

    @classmethod
    def of(cls, spec: ModelSpec, layers_apart: bool = False) -> GlobalTensors:
        """Derive keys and shapes from the parameter mapping, without allocating tensors.

        With ``layers_apart`` every layer has its own keys and only experts are stacked, as with
        megatron-core's non_homogeneous_layers.
        """
        pieces = [_piece(param, spec, layers_apart) for param in map_params(spec)]
        shapes: dict[str, tuple[int, ...]] = {}
        for piece in pieces:
            leading = len(piece.size) - len(piece.param.shard_shape(spec, 1))
            num_experts = spec.experts.count if spec.experts else 0
            stacked = (num_experts,) if layers_apart else (spec.num_layers, num_experts)
            shapes[piece.key] = (*stacked[:leading], *piece.size[leading:])
        return cls(shapes, pieces, _extra_states(spec))

    @classmethod
    def like(cls, spec: ModelSpec, stored: Iterable[str]) -> GlobalTensors:
        """Use the same stacking as the checkpoint with the weight names ``stored``."""
        return cls.of(spec, has_layers_apart(stored))


def has_layers_apart(stored: Iterable[str]) -> bool:
    """True if weights of these names were stored layer by layer."""
    return any(_IN_LAYER.match(name) for name in stored)


def _piece(param: MappedParam, spec: ModelSpec, layers_apart: bool) -> Piece:
    name = param.megatron_names[-1]
    size = param.shard_shape(spec, 1)
    in_layer = _IN_LAYER.match(name)
    if in_layer is None:
        return Piece(name, (0,) * len(size), size, param)
    key = in_layer[2]
    position: tuple[int, ...] = (int(in_layer[1]),)
    in_expert = _IN_EXPERT.match(key)
    if in_expert is not None:
        key = f"mlp.experts.experts.{in_expert[1]}"
        position = (*position, int(in_expert[2]))
    if layers_apart:
        key = f"{in_layer[1]}.{key}"
        position = position[1:]
    return Piece(
        key=f"decoder.layers.{key}",
        offset=position + (0,) * len(size),
        size=(1,) * len(position) + size,
        param=param,
    )


def _extra_states(spec: ModelSpec) -> list[str]:
    """Return the keys of Transformer Engine's objects for FP8 scales, which hold None here.

    megatron-core rejects a checkpoint that lacks an object of the model. So every module that has
    one under Transformer Engine is included; models without Transformer Engine do not read them.
    """
    experts = spec.experts.count if spec.experts else 0
    modules = [
        "self_attention.linear_qkv",
        "self_attention.core_attention",
        "self_attention.linear_proj",
    ]
    if spec.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    modules += ["pre_mlp_layernorm"] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    names = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(spec.num_layers):
        names += [
            f"decoder.layers.{name}._extra_state/shard_{layer}_{spec.num_layers}"
            for name in modules
        ]
        names += [
            f"decoder.layers.mlp.experts.experts.{linear}._extra_state/"
            f"shard_{layer}.{expert}_{spec.num_layers}.{experts}"
            for expert in range(experts)
            for linear in ("linear_fc1", "linear_fc2")
        ]
    return names


def check_stored_shapes(
    stored: dict[str, tuple[int, ...]], expected: GlobalTensors, origin: str
) -> None:
    """Raise ``ConfigError`` naming the first missing, surplus or misshapen weight of ``origin``.

    Rows of embeddings beyond the vocabulary are Megatron's padding and are allowed.
    """
    missing = [key for key in expected.shapes if key not in stored]
    if missing:
        norm = " (a layer norm is never filled in by default)" if "norm" in missing[0] else ""
        finer = (
            " (it was saved with singleton_local_shards, which is not supported)"
            if any(key.endswith("linear_fc1.weight_w") for key in stored)
            else ""
        )
        raise ConfigError(f"{origin} lacks tensor {missing[0]}{norm}{_more(missing)}{finer}")
    surplus = [key for key in stored if key not in expected.shapes]
    if surplus:
        raise ConfigError(
            f"{origin} has tensor {surplus[0]}, which the model of config.json does not have"
            + _more(surplus)
        )
    for key, size in expected.shapes.items():
        found = stored[key]
        padded = key.endswith(("word_embeddings.weight", "output_layer.weight")) and len(found) == 2
        if found != size and not (padded and found[0] > size[0] and found[1] == size[1]):
            raise ConfigError(
                f"tensor {key} in {origin} has shape {found}, the model of config.json has {size}"
            )


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
