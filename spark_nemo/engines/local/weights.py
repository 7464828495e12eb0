"""Qwen2 weights under their Hugging Face names, and the fused tensors the decoder runs on.

Everything is float32. A set of tensors is checked completely (names, shapes) before one fused
tensor is made, so a refused set leaves an engine as it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..base import EngineFailure

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class Qwen2Shape:
    """What ``config.json`` says about a Qwen2 decoder."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tied: bool

    @classmethod
    def from_folder(cls, folder: Path | str) -> Qwen2Shape:
        """Read ``config.json``. Raises ``EngineFailure`` for anything this decoder does not
        compute.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise EngineFailure(
                f"{path} is missing: a model folder needs config.json and *.safetensors"
            )
        config = _read_json(path)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if config.get("model_type") != "qwen2":
            raise EngineFailure(
                f"{path}: the embedded engine serves qwen2 only, not model_type="
                f"{config.get('model_type')!r}: use engine.kind=sglang"
            )
        unsupported = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "use_sliding_window": bool(config.get("use_sliding_window", False)),
            "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default",
        }
        for name, bad in unsupported.items():
            if bad:
                raise EngineFailure(
                    f"{path}: {name}={config.get(name)!r} is not what the local engine computes"
                )
        for name in _SIZES:
            if type(config.get(name)) is not int or config[name] < 1:
                raise EngineFailure(f"{path}: {name}={config.get(name)!r} is not a positive number")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffn_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            max_positions=config["max_position_embeddings"],
            tied=config.get("tie_word_embeddings", False),
        )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor name with its shape; a tied model has no ``lm_head.weight``."""
        hidden, ffn, q = self.hidden_size, self.ffn_size, self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, q),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        shapes = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        for index in range(self.num_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are stored input-major (``x @ w``). q, k rows are in rotary-pair
    order.

    The softmax scale 1/sqrt(head_dim) is folded into the q part of ``qkv``.
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
    """All weights of the decoder as it runs."""

    embed_VH: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_H: torch.Tensor
    head_HV: torch.Tensor


def checked(
    shape: Qwen2Shape, tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Collect named tensors, or raise ``EngineFailure`` naming the first that is unknown, repeated,
    misshapen, missing.

    A tied model may bring ``lm_head.weight`` if it equals the embedding.
    """
    expected = shape.expected()
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name in found:
            raise EngineFailure(f"tensor {name} was given twice")
        if name not in expected and not (shape.tied and name == "lm_head.weight"):
            raise EngineFailure(
                f"tensor {name} is not part of this model: give exactly its Hugging Face tensors"
            )
        want = expected.get(name, expected["model.embed_tokens.weight"])
        if tuple(tensor.shape) != want:
            raise EngineFailure(
                f"tensor {name} has shape {tuple(tensor.shape)}, the model needs {want}"
            )
        found[name] = tensor
    missing = [name for name in expected if name not in found]
    if missing:
        raise EngineFailure(
            f"tensor {missing[0]} is missing ({len(missing)} missing of {len(expected)})"
        )
    head = found.pop("lm_head.weight", None) if shape.tied else None
    if head is not None and not torch.equal(head, found["model.embed_tokens.weight"]):
        raise EngineFailure(
            "tensor lm_head.weight differs from the embedding, but config.json ties them"
        )
    return found


def _rotary_pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder each head's rows so that the two halves Hugging Face rotates against each other
    become neighbours.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def served_form(shape: Qwen2Shape, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One Hugging Face tensor as the decoder's fused tensors hold it: float32, q and k reordered, q
    scaled.
    """
    tensor = tensor.detach().to("cpu", torch.float32)
    if ".q_proj." in name:
        return _rotary_pairs(tensor, shape.head_dim) * (1 / math.sqrt(shape.head_dim))
    return _rotary_pairs(tensor, shape.head_dim) if ".k_proj." in name else tensor


def served_tensors(shape: Qwen2Shape, weights: FusedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """What ``weights`` hold of each Hugging Face tensor, in its ``served_form``; a tied model's
    head is one, too: here it is a copy.
    """
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", weights.embed_VH
    for index, layer in enumerate(weights.layers):
        parts: dict[str, torch.Tensor] = {
            "input_layernorm.weight": layer.attn_norm_H,
            "post_attention_layernorm.weight": layer.mlp_norm_H,
            "self_attn.o_proj.weight": layer.out_QH.t(),
            "mlp.down_proj.weight": layer.down_FH.t(),
        }
        for kind, fused in (("weight", layer.qkv_HQ.t()), ("bias", layer.qkv_bias_Q)):
            parts |= {
                f"self_attn.{x}_proj.{kind}": part
                for x, part in zip("qkv", fused.split([q, kv, kv]))
            }
        parts |= {
            f"mlp.{x}_proj.weight": part
            for x, part in zip(("gate", "up"), layer.gate_up_HF.t().chunk(2))
        }
        yield from ((f"model.layers.{index}.{name}", part) for name, part in parts.items())
    yield "model.norm.weight", weights.norm_H
    yield "lm_head.weight", weights.head_HV.t()


def fuse(shape: Qwen2Shape, named: dict[str, torch.Tensor]) -> FusedWeights:
    """Fused float32 copies of ``named`` (the output of ``checked``); nothing is shared with the
    input.
    """
    named = {
        name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in named.items()
    }

    def qkv(prefix: str, kind: str) -> torch.Tensor:
        names = [f"{prefix}self_attn.{part}_proj.{kind}" for part in "qkv"]
        return torch.cat([served_form(shape, name, named[name]) for name in names])

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

    embed = named["model.embed_tokens.weight"]
    return FusedWeights(
        embed_VH=embed,
        layers=tuple(layer(index) for index in range(shape.num_layers)),
        norm_H=named["model.norm.weight"],
        head_HV=named.get("lm_head.weight", embed).t().contiguous(),
    )


def read_folder(folder: Path | str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's safetensors files, one at a time.

    Raises ``EngineFailure`` when there are none, or naming the file that is damaged or lies
    elsewhere.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in _indexed(index)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineFailure(f"{folder} holds no *.safetensors: save the model with save_pretrained")
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (a handle, not a dict)
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise EngineFailure(f"{path} cannot be read: {error}") from error


def _indexed(path: Path) -> list[str]:
    """The files an index names. A folder may come from a stranger: none of them may lie outside it."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise EngineFailure(f"{path}: weight_map is missing")
    names = set(map(str, weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise EngineFailure(f"{path} names {name!r}: only files of the same folder are read")
    return sorted(names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineFailure(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(data, dict):
        raise EngineFailure(f"{path}: a JSON object is needed, not {type(data).__name__}")
    return data
