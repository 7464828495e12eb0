"""Megatron's GPTModel of a ``ModelSpec``: packed batches in, log-probabilities out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spark_nemo.config import MegatronConfig
from spark_nemo.models.spec import ModelSpec

from .cpu_compat import cuda_means_cpu, device
from .layer_spec import layer_spec, packing_arguments, uses_transformer_engine
from .logprobs import vocab_parallel_logprobs
from .packed_batch import PackedBatch
from .rope import inverse_frequencies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PackedGPT(GPTModel):
    """A GPTModel on ``PackedBatch``; its last pipeline stage returns log-probabilities."""

    def forward(
        self, batch: PackedBatch, temperature: float, with_entropy: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return hidden states [T, 1, H]; on the last stage ``(logprobs_T, entropy_T | None)``."""
        positions_1T = batch.positions_T[None]
        hidden = self.embedding(batch.tokens_T[None], positions_1T) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            **packing_arguments(batch, self.rotary_pos_emb),
        )
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        return vocab_parallel_logprobs(
            hidden[:, 0],
            weight,
            batch.labels_T,
            self.real_vocab_size,
            temperature,
            with_entropy,
            group,
        )


def build_model(spec: ModelSpec, layout: MegatronConfig) -> PackedGPT:
    """Build this rank's part of the model on its device, with uninitialised weights.

    The process groups must exist. Raises ``ConfigError`` when ``layout`` cannot split the model.
    """
    return construct(spec, layout).to(device())


def construct(spec: ModelSpec, layout: MegatronConfig) -> PackedGPT:
    """Build the model where torch puts it: under ``torch.device("meta")`` it takes no memory."""
    spec.check_layout(layout)
    config = transformer_config(spec, layout)
    with cuda_means_cpu():
        model = PackedGPT(
            config=config,
            transformer_layer_spec=layer_spec(config),
            vocab_size=spec.padded_vocab_size(layout.tensor_parallel),
            max_sequence_length=spec.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            parallel_output=True,
        )
    model.rotary_pos_emb.inv_freq = inverse_frequencies(spec)
    model.real_vocab_size = spec.vocab_size
    _mark_sharded_weights(model)
    _mark_experts(model)
    return model


def _mark_sharded_weights(model: PackedGPT) -> None:
    """Mark the weights that are split over tensor ranks.

    Megatron does it while it initialises weights, which is off here. Without the mark, clipping
    would count the shards of the first tensor rank only, and every gradient norm would be wrong.
    """
    dimension = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (
            type(module) in dimension
            and weight is not None
            and not hasattr(weight, "tensor_model_parallel")
        ):
            set_tensor_model_parallel_attributes(weight, True, dimension[type(module)], 1)


def _mark_experts(model: PackedGPT) -> None:
    """Have gradients of experts summed over all ranks that hold the same expert.

    Megatron does it only with expert_parallel > 1. But tensor ranks that each hold all experts see
    only a part of the tokens, too.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def transformer_config(spec: ModelSpec, layout: MegatronConfig) -> TransformerConfig:
    """Return Megatron's configuration of the model."""
    dtype = DTYPES[layout.dtype]
    pipelined = layout.pipeline_parallel > 1
    recompute = {
        "none": {},
        # Not core_attn, Megatron's default: flash attention recomputes itself.
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }[layout.recompute_granularity]
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # With CPU initialisation each of Transformer Engine's layers would make the whole weight of
        # all tensor ranks in float32, to cut its part out.
        use_cpu_initialization=not uses_transformer_engine(),
        # The slot for an activation function that includes the gating; layer_spec fills it.
        use_te_activation_func=not uses_transformer_engine(),
        # Every weight is written by hf_weights, which checks that none was left out.
        perform_initialization=False,
        apply_rope_fusion=uses_transformer_engine(),
        # The loss is divided by the number of tokens of all micro-batches and ranks, not averaged
        # per micro-batch.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # Micro-batches differ in length, so stages first send each other the shape. Padding all of
        # them to the longest would compute layers over padding. (Megatron then requires alltoall,
        # even without experts.)
        variable_seq_lengths=pipelined,
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=pipelined,
        batch_p2p_sync=torch.cuda.is_available(),
        **recompute,
        **_expert_settings(spec, layout),
    )


def _expert_settings(spec: ModelSpec, layout: MegatronConfig) -> dict[str, Any]:
    experts = spec.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_router_topk": experts.per_token,
        # Softmax over the chosen experts equals softmax over all, divided by the chosen ones' sum.
        "moe_router_pre_softmax": not experts.normalize_weights,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": uses_transformer_engine(),
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": 1,
    }
