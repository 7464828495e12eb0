"""What Megatron's distributed checkpoint (torch_dist) of a model holds: keys, global shapes, and
who goes where.

The tensors there know nothing of parallel ranks: those of all layers are stacked under one key,
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
    """One Megatron parameter and its box in the tensor ``key``, which is stacked over layers and
    experts.
    """

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    param: MappedParam


@dataclass(frozen=True)
class GlobalTensors:
    """The tensors of a model's weights, in Hugging Face order, and the empty objects that go with
    them.
    """

    shapes: dict[str, tuple[int, ...]]
    pieces: list[Piece]
    extra_states: list[str]

    @classmethod
    def of(cls, spec: ModelSpec, layers_apart: bool = False) -> GlobalTensors:
        """Built from the family's table alone; nothing is allocated. With ``layers_apart`` every
        layer has keys of its own, and only experts are stacked: what megatron-core calls
        non_homogeneous_layers.
        """
        pieces = [_piece(param, spec, layers_apart) for param in map_params(spec)]
        shapes: dict[str, tuple[int, ...]] = {}
        for piece in pieces:
            leading = len(piece.size) - len(piece.param.shard_shape(spec, 1))
            stacked = (spec.num_layers, spec.experts.count if spec.experts else 0)[
                int(layers_apart) :
            ]
            shapes[piece.key] = (*stacked[:leading], *piece.size[leading:])
        return cls(shapes, pieces, _extra_states(spec))

    @classmethod
    def like(cls, spec: ModelSpec, stored: Iterable[str]) -> GlobalTensors:
        """As in the checkpoint whose weights have the names ``stored``."""
        return cls.of(spec, has_layers_apart(stored))


def has_layers_apart(stored: Iterable[str]) -> bool:
    """Whether weights of these names were stored layer by layer."""
    return any(_IN_LAYER.match(name) for name in stored)


def _piece(param: MappedParam, spec: ModelSpec, layers_apart: bool) -> Piece:
    name, size = param.megatron_names[-1], param.shard_shape(spec, 1)
    in_layer = _IN_LAYER.match(name)
    if in_layer is None:
        return Piece(name, (0,) * len(size), size, param)
    layer, rest = int(in_layer[1]), in_layer[2]
    if in_expert := _IN_EXPERT.match(rest):
        key, position = f"mlp.experts.experts.{in_expert[1]}", (layer, int(in_expert[2]))
    else:
        key, position = rest, (layer,)
    if layers_apart:
        key, position = f"{layer}.{key}", position[1:]
    return Piece(
        f"decoder.layers.{key}", position + (0,) * len(size), (1,) * len(position) + size, param
    )


def _extra_states(spec: ModelSpec) -> list[str]:
    """Unique keys of the objects in which Transformer Engine keeps FP8 scales. Here they hold None.

    megatron-core refuses a checkpoint in which an object is missing that the model asks for, so
    every module that has one under Transformer Engine is named; a model without them does not read
    them.
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
    """``ConfigError`` naming the first weight that ``origin`` lacks, has too much or has in another
    shape.

    Rows of embeddings beyond the vocabulary are Megatron's padding and are allowed.
    """
    if missing := [key for key in expected.shapes if key not in stored]:
        norm = " (a layer norm is never filled in by default)" if "norm" in missing[0] else ""
        finer = (
            " (it was saved with singleton_local_shards, which is not read)"
            if any(key.endswith("linear_fc1.weight_w") for key in stored)
            else ""
        )
        raise ConfigError(f"{origin} lacks tensor {missing[0]}{norm}{_more(missing)}{finer}")
    if surplus := [key for key in stored if key not in expected.shapes]:
        raise ConfigError(
            f"{origin} has tensor {surplus[0]}, which the model of config.json does not have"
            + _more(surplus)
        )
    for key, size in expected.shapes.items():
        found = stored[key]
        padded = key.endswith(("word_embeddings.weight", "output_layer.weight")) and len(found) == 2
        if found != size and not (padded and found[0] > size[0] and found[1] == size[1]):
            raise ConfigError(
                f"tensor {key} in {origin} has shape {found}, the model of config.json wants {size}"
            )


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
