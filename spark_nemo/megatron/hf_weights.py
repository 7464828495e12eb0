"""Hugging Face weights to and from this rank's share of a Megatron model: a table of names and transforms.

A new model family is a new table. Nothing is defaulted: a tensor that is missing, surplus or misshapen is an error that
names it, and so is a Megatron parameter that no rule wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from spark_nemo.config.errors import ConfigError

from .model_shape import ModelShape

Shards = list[Tensor]
"""One tensor per tensor-parallel rank."""


@dataclass(frozen=True)
class Transform:
    """How Hugging Face tensors become the shards of one Megatron parameter, and back."""

    to_shards: Callable[[list[Tensor], ModelShape, int], Shards]
    from_gathered: Callable[[Tensor, ModelShape, int], list[Tensor]]
    """From the shards below each other in one tensor: what is cut by rows needs no second copy."""


def _chunks(tensor: Tensor, tp: int, dim: int) -> Shards:
    return list(tensor.chunk(tp, dim))


REPLICATED = Transform(lambda hf, shape, tp: [hf[0]] * tp, lambda gathered, shape, tp: [gathered])
SPLIT_COLUMNS = Transform(lambda hf, shape, tp: _chunks(hf[0], tp, 1),
                          lambda gathered, shape, tp: [torch.cat(gathered.chunk(tp), 1)])


def _pad_vocab(hf: list[Tensor], shape: ModelShape, tp: int) -> Shards:
    missing = shape.padded_vocab_size(tp) - shape.vocab_size
    return _chunks(torch.cat([hf[0], hf[0].new_zeros(missing, hf[0].shape[1])]), tp, 0)


VOCAB_ROWS = Transform(_pad_vocab, lambda gathered, shape, tp: [gathered[:shape.vocab_size]])


def _fuse_qkv(hf: list[Tensor], shape: ModelShape, tp: int) -> Shards:
    """Rows in Megatron's order: for each key-value head its query heads, then the key, then the value."""
    grouped = [x.reshape(shape.num_kv_heads, -1, *x.shape[1:]) for x in hf]
    return _chunks(torch.cat(grouped, 1).reshape(-1, *hf[0].shape[1:]), tp, 0)


def _split_qkv(fused: Tensor, shape: ModelShape, tp: int) -> list[Tensor]:
    grouped = fused.reshape(shape.num_kv_heads, -1, *fused.shape[1:])
    queries = shape.num_heads // shape.num_kv_heads * shape.head_dim
    parts = grouped.split([queries, shape.head_dim, shape.head_dim], 1)
    return [x.reshape(-1, *fused.shape[1:]) for x in parts]


QKV = Transform(_fuse_qkv, _split_qkv)
GATE_UP = Transform(
    lambda hf, shape, tp: [torch.cat(pair) for pair in zip(_chunks(hf[0], tp, 0), _chunks(hf[1], tp, 0))],
    lambda gathered, shape, tp: [torch.cat(x) for x in zip(*(shard.chunk(2) for shard in gathered.chunk(tp)))])


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (``{i}`` is the layer within its stage) and the Hugging Face tensors it is made of."""

    megatron: tuple[str, ...]
    """Its possible names; Transformer Engine fuses a norm into the linear layer that follows."""
    hf: dict[str, tuple[int, ...]]
    """Names (``{i}`` is the layer of the whole model) and shapes, in the order of ``transform``."""
    transform: Transform


def qwen2_rules(shape: ModelShape) -> dict[str, list[Rule]]:
    """The table of Qwen2 and Qwen2.5: rules for the ``first`` stage, every ``layer`` and the ``last`` stage."""
    H, q, kv, ffn = (shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim,
                     shape.ffn_size)
    hf, mg = "model.layers.{i}.", "decoder.layers.{i}."
    vocab = (shape.vocab_size, H)
    output = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"

    def attention(kind: str, *columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{hf}self_attn.{x}_proj.{kind}": (rows, *columns) for x, rows in (("q", q), ("k", kv), ("v", kv))}

    return {
        "first": [Rule(("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": vocab}, VOCAB_ROWS)],
        "layer": [
            Rule((f"{mg}input_layernorm.weight", f"{mg}self_attention.linear_qkv.layer_norm_weight"),
                 {f"{hf}input_layernorm.weight": (H,)}, REPLICATED),
            Rule((f"{mg}self_attention.linear_qkv.weight",), attention("weight", H), QKV),
            Rule((f"{mg}self_attention.linear_qkv.bias",), attention("bias"), QKV),
            Rule((f"{mg}self_attention.linear_proj.weight",), {f"{hf}self_attn.o_proj.weight": (H, q)}, SPLIT_COLUMNS),
            Rule((f"{mg}pre_mlp_layernorm.weight", f"{mg}mlp.linear_fc1.layer_norm_weight"),
                 {f"{hf}post_attention_layernorm.weight": (H,)}, REPLICATED),
            Rule((f"{mg}mlp.linear_fc1.weight",),
                 {f"{hf}mlp.gate_proj.weight": (ffn, H), f"{hf}mlp.up_proj.weight": (ffn, H)}, GATE_UP),
            Rule((f"{mg}mlp.linear_fc2.weight",), {f"{hf}mlp.down_proj.weight": (H, ffn)}, SPLIT_COLUMNS),
        ],
        "last": [
            Rule(("decoder.final_layernorm.weight",), {"model.norm.weight": (H,)}, REPLICATED),
            Rule(("output_layer.weight",), {output: vocab}, VOCAB_ROWS),
        ],
    }


@dataclass(frozen=True)
class PlacedRule:
    """A rule for one layer: the pipeline stage that holds it, and names with the layer filled in."""

    stage: int
    rule: Rule
    megatron: tuple[str, ...]
    hf: dict[str, tuple[int, ...]]


def placed_rules(shape: ModelShape, pipeline_parallel: int) -> Iterator[PlacedRule]:
    """Every parameter of the whole model in Hugging Face order, with where it lives. The same on every rank."""
    table, per_stage = qwen2_rules(shape), shape.num_layers // pipeline_parallel

    def place(stage: int, rule: Rule, layer: int = 0) -> PlacedRule:
        local = tuple(name.format(i=layer % per_stage) for name in rule.megatron)
        return PlacedRule(stage, rule, local, {name.format(i=layer): size for name, size in rule.hf.items()})

    yield from (place(0, rule) for rule in table["first"])
    for layer in range(shape.num_layers):
        yield from (place(layer // per_stage, rule, layer) for rule in table["layer"])
    for rule in table["last"]:
        # Tied embeddings on one stage are one parameter; on several, the last stage has a copy of its own.
        if not ("output_layer.weight" in rule.megatron and shape.tied_embeddings and pipeline_parallel == 1):
            yield place(pipeline_parallel - 1, rule)


def hf_tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's Hugging Face tensors, in the order of ``export_tensors``."""
    return {name: size for placed in placed_rules(shape, 1) for name, size in placed.hf.items()}


def load_tensors(model: torch.nn.Module, shape: ModelShape, source: Mapping[str, Tensor], origin: str) -> None:
    """Write ``source`` (read tensor by tensor) into this rank's share of ``model``. No communication.

    Raises ``ConfigError`` naming the tensor that is missing from ``origin``, surplus in it, or of another shape.
    """
    _check_names(set(source), shape, origin)
    tp, tp_rank = (parallel_state.get_tensor_model_parallel_world_size(),
                   parallel_state.get_tensor_model_parallel_rank())
    pp, stage = (parallel_state.get_pipeline_model_parallel_world_size(),
                 parallel_state.get_pipeline_model_parallel_rank())
    parameters, written = dict(model.named_parameters()), set()
    for placed in placed_rules(shape, pp):
        if placed.stage != stage:
            continue
        tensors = [_read(source, name, size, origin) for name, size in placed.hf.items()]
        name = _find(placed, parameters)
        shard = placed.rule.transform.to_shards(tensors, shape, tp)[tp_rank]
        with torch.no_grad():
            parameters[name].copy_(shard)
        written.add(name)
    if forgotten := sorted(set(parameters) - written):
        raise ConfigError(f"parameter {forgotten[0]} has no rule in megatron/hf_weights.py")


def export_tensors(model: torch.nn.Module, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors one parameter at a time, on every rank. Collective: all ranks iterate to the end.

    The owning stage gathers over its tensor-parallel group, then hands the tensor on over the pipeline group.
    """
    pp, stage = (parallel_state.get_pipeline_model_parallel_world_size(),
                 parallel_state.get_pipeline_model_parallel_rank())
    tp = parallel_state.get_tensor_model_parallel_world_size()
    parameters, seen = dict(model.named_parameters()), set()
    for placed in placed_rules(shape, pp):
        if seen.issuperset(placed.hf):  # the last stage's copy of tied embeddings
            continue
        seen.update(placed.hf)
        if placed.stage == stage:
            parameter = parameters[_find(placed, parameters)].detach()
            gathered = parameter if placed.rule.transform is REPLICATED else _gather(parameter)
            tensors = [x.contiguous() for x in placed.rule.transform.from_gathered(gathered, shape, tp)]
            del gathered
        else:
            some = next(iter(parameters.values()))
            tensors = [torch.empty(size, dtype=some.dtype, device=some.device) for size in placed.hf.values()]
        for name, tensor in zip(placed.hf, tensors):
            if pp > 1:
                group = parallel_state.get_pipeline_model_parallel_group()
                dist.broadcast(tensor, src=dist.get_global_rank(group, placed.stage), group=group)
            yield name, tensor
        del tensors, tensor  # not beside the next parameter's


def _gather(parameter: Tensor) -> Tensor:
    """The shards of all tensor-parallel ranks below each other."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return parameter
    gathered = parameter.new_empty(group.size() * parameter.shape[0], *parameter.shape[1:])
    dist.all_gather(list(gathered.chunk(group.size())), parameter.contiguous(), group=group)
    return gathered


def _find(placed: PlacedRule, parameters: dict[str, torch.nn.Parameter]) -> str:
    for name in placed.megatron:
        if name in parameters:
            return name
    raise ConfigError(f"the Megatron model has no parameter {' or '.join(placed.megatron)}")


def _read(source: Mapping[str, Tensor], name: str, size: tuple[int, ...], origin: str) -> Tensor:
    tensor = source[name]
    if tuple(tensor.shape) != size:
        raise ConfigError(f"tensor {name} in {origin} has shape {tuple(tensor.shape)}, config.json says {size}")
    return tensor


def _check_names(names: set[str], shape: ModelShape, origin: str) -> None:
    expected = set(hf_tensor_shapes(shape))
    # Caches of rotary angles, and a stored copy of a tied head, hold nothing of their own.
    ignored = {name for name in names if re.search(r"rotary_emb\.inv_freq$", name)}
    if shape.tied_embeddings:
        ignored.add("lm_head.weight")
    if missing := sorted(expected - names):
        raise ConfigError(f"{origin} lacks tensor {missing[0]}"
                          + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    if surplus := sorted(names - expected - ignored):
        raise ConfigError(f"{origin} has tensor {surplus[0]}, which the model does not have"
                          + (f", and {len(surplus) - 1} more" if len(surplus) > 1 else ""))
