"""Mapping of Hugging Face tensors to Megatron parameters: names, shapes, fusion and sharding.

The one description of a model's tensors. Checkpoint conversion, loading, export, memory sizing,
weight sync and the embedded engine all read it. Names are those of transformers'
``LlamaForCausalLM`` and its descendants, and of megatron-core's ``GPTModel``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from .spec import ExpertSpec, ModelSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_HF_LAYER = "model.layers.{layer}."
_MEGATRON_LAYER = "decoder.layers.{layer}."


class Split(Enum):
    """Fusion of Hugging Face tensors into one parameter, and its cut over tensor-parallel ranks."""

    REPLICATED = "replicated"
    """One tensor, whole on every rank."""
    COLUMNS = "columns"
    """One tensor, cut by columns."""
    VOCAB_ROWS = "vocab_rows"
    """One tensor, padded with zero rows to a multiple of the ranks and cut by rows."""
    QKV = "qkv"
    """For each key-value head: the rows of its query heads, its key, its value; cut by rows.

    With more ranks than key-value heads a rank has a piece of one head's rows. megatron-core gathers
    the product over the ranks and selects each rank's heads from it (transformer/attention.py).
    """
    GATE_UP = "gate_up"
    """A rank's rows of gate_proj, then its rows of up_proj."""

    @property
    def shard_dim(self) -> int | None:
        """Dimension that tensor-parallel ranks divide; None if every rank has all of it."""
        if self is Split.REPLICATED:
            return None
        return 1 if self is Split.COLUMNS else 0


@dataclass(frozen=True)
class MappedParam:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron_names: tuple[str, ...]
    """Possible names within the pipeline stage and expert rank; Transformer Engine's is the last.

    Transformer Engine fuses a norm into the linear layer that follows it.
    """
    hf_shapes: dict[str, tuple[int, ...]]
    """Hugging Face names and shapes, in the order of fusion."""
    split: Split
    stage: int
    """The pipeline stage that holds it."""
    expert: int | None = None
    """The expert of its layer that it belongs to."""
    expert_rank: int | None = None
    """The expert-parallel rank that holds it; None if all do."""

    def shard_shape(self, spec: ModelSpec, tensor_parallel: int) -> tuple[int, ...]:
        """Return the shape that one of ``tensor_parallel`` ranks holds."""
        # An expert is whole on one expert-parallel rank, and never cut further.
        ranks = tensor_parallel if self.expert is None else 1
        shapes = list(self.hf_shapes.values())
        rows = sum(shape[0] for shape in shapes)
        other_dims = shapes[0][1:]
        match self.split:
            case Split.REPLICATED:
                return (rows, *other_dims)
            case Split.COLUMNS:
                return (rows, other_dims[0] // ranks)
            case Split.VOCAB_ROWS:
                return (spec.padded_vocab_size(ranks) // ranks, *other_dims)
            case _:
                return (rows // ranks, *other_dims)

    @property
    def num_elements(self) -> int:
        """Elements of its Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.hf_shapes.values())


@dataclass(frozen=True)
class ParamRule:
    """A ``MappedParam`` of every layer (``{layer}`` in its names) or expert (``{expert}``)."""

    megatron_names: tuple[str, ...]
    hf_shapes: dict[str, tuple[int, ...]]
    split: Split
    per_expert: bool = False


@dataclass(frozen=True)
class ParamRules:
    """Rules of the first pipeline stage, of every layer and of the last stage."""

    first: list[ParamRule]
    layer: list[ParamRule]
    last: list[ParamRule]


def map_params(
    spec: ModelSpec, pipeline_parallel: int = 1, expert_parallel: int = 1
) -> Iterator[MappedParam]:
    """Yield every parameter of the model in Hugging Face order, with the ranks that hold it.

    The export is collective and follows this order, so it is the same on every rank.
    """
    rules = param_rules(spec)
    layers_per_stage = spec.num_layers // pipeline_parallel
    for rule in rules.first:
        yield MappedParam(rule.megatron_names, rule.hf_shapes, rule.split, stage=0)
    for layer in range(spec.num_layers):
        # Neighbouring rules of experts are taken together: all tensors of one expert, then the next.
        for per_expert, group in itertools.groupby(rules.layer, lambda rule: rule.per_expert):
            layer_rules = list(group)
            if not per_expert:
                for rule in layer_rules:
                    yield _layer_param(rule, layer, layers_per_stage)
                continue
            assert spec.experts is not None
            experts_per_rank = spec.experts.count // expert_parallel
            for expert in range(spec.experts.count):
                for rule in layer_rules:
                    yield _expert_param(rule, layer, layers_per_stage, expert, experts_per_rank)
    for rule in rules.last:
        # Tied embeddings on one stage are one parameter; on several stages the last has a copy.
        if is_output_layer(rule) and spec.tied_embeddings and pipeline_parallel == 1:
            continue
        last_stage = pipeline_parallel - 1
        yield MappedParam(rule.megatron_names, rule.hf_shapes, rule.split, stage=last_stage)


def _layer_param(rule: ParamRule, layer: int, layers_per_stage: int) -> MappedParam:
    # Megatron numbers the layers of a stage from 0.
    local = layer % layers_per_stage
    return MappedParam(
        tuple(name.format(layer=local) for name in rule.megatron_names),
        {name.format(layer=layer): shape for name, shape in rule.hf_shapes.items()},
        rule.split,
        stage=layer // layers_per_stage,
    )


def _expert_param(
    rule: ParamRule, layer: int, layers_per_stage: int, expert: int, experts_per_rank: int
) -> MappedParam:
    local = {"layer": layer % layers_per_stage, "expert": expert % experts_per_rank}
    return MappedParam(
        tuple(name.format(**local) for name in rule.megatron_names),
        {name.format(layer=layer, expert=expert): shape for name, shape in rule.hf_shapes.items()},
        rule.split,
        stage=layer // layers_per_stage,
        expert=expert,
        expert_rank=expert // experts_per_rank,
    )


def hf_tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the model's Hugging Face tensors, in the order of the export."""
    shapes: dict[str, tuple[int, ...]] = {}
    for param in map_params(spec):
        shapes |= param.hf_shapes
    return shapes


def is_output_layer(rule: ParamRule) -> bool:
    """Return True for the output layer, which tied embeddings share with the embedding."""
    return "output_layer.weight" in rule.megatron_names


def param_rules(spec: ModelSpec) -> ParamRules:
    """Return the rules of a model: Llama's decoder with the biases, norms and experts of ``spec``."""
    if spec.experts is None:
        feed_forward = _dense_rules(spec)
    else:
        feed_forward = _expert_rules(spec, spec.experts)
    vocab_shape = (spec.vocab_size, spec.hidden_size)
    head = EMBEDDING if spec.tied_embeddings else HEAD
    return ParamRules(
        first=[
            ParamRule(
                ("embedding.word_embeddings.weight",), {EMBEDDING: vocab_shape}, Split.VOCAB_ROWS
            )
        ],
        layer=[*_attention_rules(spec), *feed_forward],
        last=[
            ParamRule(
                ("decoder.final_layernorm.weight",),
                {"model.norm.weight": (spec.hidden_size,)},
                Split.REPLICATED,
            ),
            ParamRule(("output_layer.weight",), {head: vocab_shape}, Split.VOCAB_ROWS),
        ],
    )


def _attention_rules(spec: ModelSpec) -> list[ParamRule]:
    H = spec.hidden_size
    qkv_rows = {"q": spec.q_rows, "k": spec.kv_rows, "v": spec.kv_rows}
    rules = [
        ParamRule(
            (
                f"{_MEGATRON_LAYER}input_layernorm.weight",
                f"{_MEGATRON_LAYER}self_attention.linear_qkv.layer_norm_weight",
            ),
            {f"{_HF_LAYER}input_layernorm.weight": (H,)},
            Split.REPLICATED,
        ),
        ParamRule(
            (f"{_MEGATRON_LAYER}self_attention.linear_qkv.weight",),
            {f"{_HF_LAYER}self_attn.{x}_proj.weight": (rows, H) for x, rows in qkv_rows.items()},
            Split.QKV,
        ),
    ]
    if spec.qkv_bias:
        rules.append(
            ParamRule(
                (f"{_MEGATRON_LAYER}self_attention.linear_qkv.bias",),
                {f"{_HF_LAYER}self_attn.{x}_proj.bias": (rows,) for x, rows in qkv_rows.items()},
                Split.QKV,
            )
        )
    if spec.qk_norm:
        rules += [
            ParamRule(
                (f"{_MEGATRON_LAYER}self_attention.{x}_layernorm.weight",),
                {f"{_HF_LAYER}self_attn.{x}_norm.weight": (spec.head_dim,)},
                Split.REPLICATED,
            )
            for x in ("q", "k")
        ]
    rules.append(
        ParamRule(
            (f"{_MEGATRON_LAYER}self_attention.linear_proj.weight",),
            {f"{_HF_LAYER}self_attn.o_proj.weight": (H, spec.q_rows)},
            Split.COLUMNS,
        )
    )
    return rules


def _dense_rules(spec: ModelSpec) -> list[ParamRule]:
    H = spec.hidden_size
    F = spec.ffn_size
    return [
        ParamRule(
            (
                f"{_MEGATRON_LAYER}pre_mlp_layernorm.weight",
                f"{_MEGATRON_LAYER}mlp.linear_fc1.layer_norm_weight",
            ),
            {f"{_HF_LAYER}post_attention_layernorm.weight": (H,)},
            Split.REPLICATED,
        ),
        ParamRule(
            (f"{_MEGATRON_LAYER}mlp.linear_fc1.weight",),
            {
                f"{_HF_LAYER}mlp.gate_proj.weight": (F, H),
                f"{_HF_LAYER}mlp.up_proj.weight": (F, H),
            },
            Split.GATE_UP,
        ),
        ParamRule(
            (f"{_MEGATRON_LAYER}mlp.linear_fc2.weight",),
            {f"{_HF_LAYER}mlp.down_proj.weight": (H, F)},
            Split.COLUMNS,
        ),
    ]


def _expert_rules(spec: ModelSpec, experts: ExpertSpec) -> list[ParamRule]:
    H = spec.hidden_size
    F = experts.ffn_size
    hf_expert = f"{_HF_LAYER}mlp.experts.{{expert}}."
    megatron_experts = f"{_MEGATRON_LAYER}mlp.experts."

    def linear_names(linear: str) -> tuple[str, str]:
        return (
            f"{megatron_experts}local_experts.{{expert}}.{linear}.weight",
            f"{megatron_experts}{linear}.weight{{expert}}",
        )

    return [
        # The router follows this norm, so Transformer Engine has no linear layer to fuse it into.
        ParamRule(
            (f"{_MEGATRON_LAYER}pre_mlp_layernorm.weight",),
            {f"{_HF_LAYER}post_attention_layernorm.weight": (H,)},
            Split.REPLICATED,
        ),
        ParamRule(
            (f"{_MEGATRON_LAYER}mlp.router.weight",),
            {f"{_HF_LAYER}mlp.gate.weight": (experts.count, H)},
            Split.REPLICATED,
        ),
        ParamRule(
            linear_names("linear_fc1"),
            {f"{hf_expert}gate_proj.weight": (F, H), f"{hf_expert}up_proj.weight": (F, H)},
            Split.GATE_UP,
            per_expert=True,
        ),
        ParamRule(
            linear_names("linear_fc2"),
            {f"{hf_expert}down_proj.weight": (H, F)},
            Split.COLUMNS,
            per_expert=True,
        ),
    ]
