"""Rules that Llama and its descendants share: names in Hugging Face's LlamaForCausalLM and in
Megatron's GPTModel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .table import GATE_UP, QKV, REPLICATED, SPLIT_COLUMNS, VOCAB_ROWS, Rule, Table

if TYPE_CHECKING:
    from ..model_shape import ModelShape

HF, MG = "model.layers.{i}.", "decoder.layers.{i}."


def dense(shape: ModelShape) -> Table:
    """The whole table of a decoder without experts; biases and norms of q and k as ``shape`` says."""
    return Table(embedding(shape), [*attention(shape), *feed_forward(shape)], output(shape))


def embedding(shape: ModelShape) -> list[Rule]:
    """The first stage."""
    size = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    return [Rule(("embedding.word_embeddings.weight",), size, VOCAB_ROWS)]


def output(shape: ModelShape) -> list[Rule]:
    """The last stage: a norm and the output layer, which may be the embedding."""
    name = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
    return [
        Rule(
            ("decoder.final_layernorm.weight",),
            {"model.norm.weight": (shape.hidden_size,)},
            REPLICATED,
        ),
        Rule(("output_layer.weight",), {name: (shape.vocab_size, shape.hidden_size)}, VOCAB_ROWS),
    ]


def attention(shape: ModelShape) -> list[Rule]:
    """A norm, q, k and v with what biases and norms the family has, and the projection back."""
    H, q, kv = (
        shape.hidden_size,
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )

    def fused(kind: str, *columns: int) -> Rule:
        tensors = {
            f"{HF}self_attn.{x}_proj.{kind}": (rows, *columns)
            for x, rows in (("q", q), ("k", kv), ("v", kv))
        }
        return Rule((f"{MG}self_attention.linear_qkv.{kind}",), tensors, QKV)

    norms = [
        Rule(
            (f"{MG}self_attention.{x}_layernorm.weight",),
            {f"{HF}self_attn.{x}_norm.weight": (shape.head_dim,)},
            REPLICATED,
        )
        for x in "qk"
    ]
    return [
        Rule(
            (f"{MG}input_layernorm.weight", f"{MG}self_attention.linear_qkv.layer_norm_weight"),
            {f"{HF}input_layernorm.weight": (H,)},
            REPLICATED,
        ),
        fused("weight", H),
        *([fused("bias")] if shape.qkv_bias else []),
        *(norms if shape.qk_norm else []),
        Rule(
            (f"{MG}self_attention.linear_proj.weight",),
            {f"{HF}self_attn.o_proj.weight": (H, q)},
            SPLIT_COLUMNS,
        ),
    ]


def feed_forward(shape: ModelShape) -> list[Rule]:
    """A norm and one gated feed-forward network."""
    H, ffn = shape.hidden_size, shape.ffn_size
    return [
        Rule(
            (f"{MG}pre_mlp_layernorm.weight", f"{MG}mlp.linear_fc1.layer_norm_weight"),
            {f"{HF}post_attention_layernorm.weight": (H,)},
            REPLICATED,
        ),
        Rule(
            (f"{MG}mlp.linear_fc1.weight",),
            {f"{HF}mlp.gate_proj.weight": (ffn, H), f"{HF}mlp.up_proj.weight": (ffn, H)},
            GATE_UP,
        ),
        Rule(
            (f"{MG}mlp.linear_fc2.weight",), {f"{HF}mlp.down_proj.weight": (H, ffn)}, SPLIT_COLUMNS
        ),
    ]
