"""Qwen2 weights under their Hugging Face names, and the fused tensors that the decoder computes with.

Everything is float32. The names and shapes of a set of tensors are checked before any fused tensor
is made, so an invalid set leaves the engine as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from spark_nemo.config import ConfigError
from spark_nemo.models.hf_config import read_hf_config, require
from spark_nemo.models.hf_folder import check_weight_file, weight_files
from spark_nemo.models.param_mapping import EMBEDDING, HEAD, hf_tensor_shapes
from spark_nemo.models.spec import ModelSpec

from ..base import EngineFailure


def read_spec(folder: Path | str) -> ModelSpec:
    """Read the sizes of a Qwen2 folder. Raises ``EngineFailure`` for a model that is not supported."""
    source = f"{folder}/config.json"
    try:
        config = read_hf_config(folder)
        if config.get("model_type") != "qwen2":
            raise EngineFailure(
                f"{source}: model_type={config.get('model_type')!r}: the embedded engine "
                "serves qwen2 only; use engine.kind=sglang"
            )
        # The longest context: a default would let requests run beyond what the model was trained for.
        require(config, "max_position_embeddings", source)
        return ModelSpec.from_hf(config, source)
    except ConfigError as error:
        raise EngineFailure(str(error)) from error


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are stored input-major (``x @ w``).

    The rows of q and k are in rotary-pair order, and the softmax scale 1/sqrt(head_dim) is folded
    into the q part of ``qkv``.
    """

    attn_norm_H: torch.Tensor
    qkv_HQ: torch.Tensor
    qkv_bias_Q: torch.Tensor
    out_QH: torch.Tensor
    mlp_norm_H: torch.Tensor
    gate_up_HF: torch.Tensor
    down_FH: torch.Tensor


@dataclass(frozen=True, slots=True)
class FusedWeights:
    """All weights of the decoder."""

    embed_VH: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_H: torch.Tensor
    head_HV: torch.Tensor


def checked(
    spec: ModelSpec, tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Collect named tensors, checking that they are exactly the model's.

    A tied model may bring ``lm_head.weight`` if it equals the embedding. Raises ``EngineFailure``
    naming the first tensor that is unknown, repeated, missing or of another shape.
    """
    expected = hf_tensor_shapes(spec)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name in found:
            raise EngineFailure(f"tensor {name} was given twice")
        if name not in expected and not (spec.tied_embeddings and name == HEAD):
            raise EngineFailure(
                f"tensor {name} is not part of this model: give exactly its Hugging Face tensors"
            )
        shape = expected.get(name, expected[EMBEDDING])
        if tuple(tensor.shape) != shape:
            raise EngineFailure(
                f"tensor {name} has shape {tuple(tensor.shape)}, the model needs {shape}"
            )
        found[name] = tensor
    missing = [name for name in expected if name not in found]
    if missing:
        raise EngineFailure(
            f"tensor {missing[0]} is missing ({len(missing)} missing of {len(expected)})"
        )
    if spec.tied_embeddings:
        head = found.pop(HEAD, None)
        if head is not None and not torch.equal(head, found[EMBEDDING]):
            raise EngineFailure(
                f"tensor {HEAD} differs from the embedding, but config.json ties them"
            )
    return found


def served_form(spec: ModelSpec, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a Hugging Face tensor as the fused tensors hold it: float32, q and k reordered, q scaled."""
    tensor = tensor.detach().to("cpu", torch.float32)
    if ".q_proj." in name:
        return _rotary_pairs(tensor, spec.head_dim) * (1 / math.sqrt(spec.head_dim))
    if ".k_proj." in name:
        return _rotary_pairs(tensor, spec.head_dim)
    return tensor


def served_tensors(spec: ModelSpec, weights: FusedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every Hugging Face tensor in its ``served_form``, taken from the fused tensors.

    A tied model's head is included: the decoder has a copy of the embedding for it.
    """
    yield EMBEDDING, weights.embed_VH
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        yield f"{prefix}input_layernorm.weight", layer.attn_norm_H
        yield f"{prefix}post_attention_layernorm.weight", layer.mlp_norm_H
        yield f"{prefix}self_attn.o_proj.weight", layer.out_QH.t()
        yield f"{prefix}mlp.down_proj.weight", layer.down_FH.t()
        qkv_rows = [spec.q_rows, spec.kv_rows, spec.kv_rows]
        for kind, fused in (("weight", layer.qkv_HQ.t()), ("bias", layer.qkv_bias_Q)):
            for x, tensor in zip("qkv", fused.split(qkv_rows)):
                yield f"{prefix}self_attn.{x}_proj.{kind}", tensor
        gate, up = layer.gate_up_HF.t().chunk(2)
        yield f"{prefix}mlp.gate_proj.weight", gate
        yield f"{prefix}mlp.up_proj.weight", up
    yield "model.norm.weight", weights.norm_H
    yield HEAD, weights.head_HV.t()


def fuse(spec: ModelSpec, named: dict[str, torch.Tensor]) -> FusedWeights:
    """Return fused float32 copies of ``named`` (the output of ``checked``).

    No memory is shared with the input.
    """
    named = {
        name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in named.items()
    }

    def qkv(prefix: str, kind: str) -> torch.Tensor:
        names = [f"{prefix}self_attn.{x}_proj.{kind}" for x in "qkv"]
        return torch.cat([served_form(spec, name, named[name]) for name in names])

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        gate_up = torch.cat(
            [named[f"{prefix}mlp.gate_proj.weight"], named[f"{prefix}mlp.up_proj.weight"]]
        )
        return LayerWeights(
            attn_norm_H=named[f"{prefix}input_layernorm.weight"],
            qkv_HQ=qkv(prefix, "weight").t().contiguous(),
            qkv_bias_Q=qkv(prefix, "bias"),
            out_QH=named[f"{prefix}self_attn.o_proj.weight"].t().contiguous(),
            mlp_norm_H=named[f"{prefix}post_attention_layernorm.weight"],
            gate_up_HF=gate_up.t().contiguous(),
            down_FH=named[f"{prefix}mlp.down_proj.weight"].t().contiguous(),
        )

    return FusedWeights(
        embed_VH=named[EMBEDDING],
        layers=tuple(layer(index) for index in range(spec.num_layers)),
        norm_H=named["model.norm.weight"],
        head_HV=named.get(HEAD, named[EMBEDDING]).t().contiguous(),
    )


def _rotary_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder each head's rows so that the two halves that Hugging Face rotates become neighbours."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def read_folder(folder: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a folder's safetensors files, one at a time.

    Raises ``EngineFailure`` naming the file that is missing, damaged or outside the folder.
    """
    try:
        paths = weight_files(Path(folder))
    except ConfigError as error:
        raise EngineFailure(str(error)) from error
    for path in paths:
        try:
            check_weight_file(path)
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    yield name, handle.get_tensor(name)
        except ConfigError as error:
            raise EngineFailure(str(error)) from error
        except (SafetensorError, OSError) as error:
            raise EngineFailure(f"{path} cannot be read: {error}") from error
