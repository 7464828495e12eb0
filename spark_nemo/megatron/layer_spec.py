"""Modules of a transformer layer: Transformer Engine's on its GPUs, this package's elsewhere."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from .attention import PackedCoreAttention, PackedRows
from .layers import RMSNorm, swiglu
from .packed_batch import PackedBatch


def uses_transformer_engine() -> bool:
    """True if Transformer Engine is installed and there is a CUDA device."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the layers of GPTModel; parameters have the same checkpoint names either way."""
    if uses_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer = spec.submodules
    attention = layer.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts is None:
        layer.mlp.submodules.activation_func = swiglu
    else:
        layer.mlp.submodules.experts.submodules.activation_func = swiglu
        # Transformer Engine does not fuse the norm before a router, so the norm keeps its own name
        # in a checkpoint.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )


def packing_arguments(batch: PackedBatch, rotary: RotaryEmbedding) -> dict[str, Any]:
    """Return the decoder's arguments that describe a pack's sequences and their positions."""
    if uses_transformer_engine():
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens_N,
            cu_seqlens_kv=batch.cu_seqlens_N,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        return {
            "packed_seq_params": params,
            "rotary_pos_emb": rotary(table_length(batch.max_seqlen), packed_seq=True),
        }
    angles = rotary.get_freqs_non_repeated(batch.max_seqlen).to(batch.positions_T.device)
    rows = PackedRows.from_cu_seqlens(
        batch.cu_seqlens_N,
        rotary=tuple(table[batch.positions_T, None] for table in (angles.cos(), angles.sin())),
    )
    return {"packed_seq_params": rows, "rotary_pos_emb": None}


def table_length(max_seqlen: int) -> int:
    """Return the rows of the rotary table: the power of two that holds ``max_seqlen``.

    Megatron caches the last 32 tables on the GPU: half a gigabyte at 32k tokens if every
    micro-batch brought another length.
    """
    return 1 << (max_seqlen - 1).bit_length()
