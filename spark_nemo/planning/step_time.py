"""Estimate the time of a step, phase by phase, from assumed rates; never compared with a cluster.

Phases are added up. Where they overlap (verifications start while rollouts are still written), a
step is shorter.
"""

from __future__ import annotations

import math

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.sizing.rank import RankMemory
from spark_nemo.megatron.sizing.states import ITEM_BYTES
from spark_nemo.models.spec import ModelSpec

from .cluster import GB, Cluster, Rates
from .engine_memory import EngineMemory
from .workload import Generation, Training


def forward_flops_per_token(spec: ModelSpec, context: float) -> float:
    """Return the operations of one token's forward pass.

    Two per weight that the token meets, with the output layer and without the embedding, and the
    attention's products over half of ``context`` on average (Narayanan et al., 2021,
    arXiv:2104.04473, without their 4 B s h).
    """
    q, k, H = (
        spec.num_heads * spec.head_dim,
        spec.num_kv_heads * spec.head_dim,
        spec.hidden_size,
    )
    layer = 2 * (H * (q + 2 * k) + q * H) + _feed_forward_flops(spec)
    return spec.num_layers * layer + 2 * spec.vocab_size * H + 2 * spec.num_layers * q * context


def _feed_forward_flops(spec: ModelSpec) -> float:
    """Return the operations per token of one layer's MLP, or of a token's experts."""
    experts = spec.experts
    width = spec.ffn_size if experts is None else experts.per_token * experts.ffn_size
    return 6 * spec.hidden_size * width


def training_seconds(
    work: Training, layout: MegatronConfig, worst: RankMemory, cluster: Cluster, rates: Rates
) -> dict[str, float]:
    """Return the seconds of forward passes, of training, and of reduction and optimizer."""
    mean = work.longest * rates.mean_length
    tokens = work.sequences * mean
    per_token = forward_flops_per_token(work.model.spec, mean)
    # The loss computes logits again in its backward pass; recomputation does so with every layer,
    # or its MLP.
    again, collectives = 2 * work.model.spec.vocab_size * work.model.spec.hidden_size, 4
    if layout.recompute_granularity == "selective":
        again, collectives = (
            again + work.model.spec.num_layers * _feed_forward_flops(work.model.spec),
            5,
        )
    elif layout.recompute_granularity == "full":
        again, collectives = per_token, 6
    one_pass = _pass_seconds(work, layout, tokens, per_token, 2, cluster, rates)
    trained = _pass_seconds(
        work, layout, tokens, 3 * per_token + again, collectives, cluster, rates
    )
    phases = {"logprobs": work.forward_passes * one_pass} if work.forward_passes else {}
    phases["train"] = trained
    dp = layout.data_parallel
    bandwidth = (
        rates.nvlink_gbs if layout.world_size <= cluster.gpus_per_node else rates.network_gbs
    )
    gradient = ITEM_BYTES[layout.grad_reduce_dtype]
    moved = gradient * 2 if not layout.distributed_optimizer else gradient + 2
    reduced = worst.num_parameters * moved * (dp - 1) / dp
    touched = 2 * worst.states.optimizer + worst.states.gradients
    phases["optimizer"] = work.updates * (reduced / bandwidth + touched / rates.memory_gbs) / GB
    return phases


def _pass_seconds(
    work: Training,
    layout: MegatronConfig,
    tokens: float,
    flops: float,
    collectives: int,
    cluster: Cluster,
    rates: Rates,
) -> float:
    """Return the seconds of one pass over ``tokens``: products and the tensor ranks' collectives.

    The pipeline's bubble stretches both by (micro-batches + stages - 1) / micro-batches.
    """
    spec, tp, pp = work.model.spec, layout.tensor_parallel, layout.pipeline_parallel
    products = tokens * flops / (layout.world_size * rates.train_tflops * 1e12)
    rows = tokens / layout.data_parallel
    item = 2 if layout.dtype == "bfloat16" else 4
    moved = spec.num_layers / pp * collectives * 2 * (tp - 1) / tp * rows * spec.hidden_size * item
    bandwidth = rates.nvlink_gbs if tp <= cluster.gpus_per_node else rates.network_gbs
    batches = max(1, math.ceil(rows / work.updates / max(layout.tokens_per_micro_batch, 1)))
    return (products + moved / bandwidth / GB) * (batches + pp - 1) / batches


def generation_seconds(work: Generation, engine: EngineMemory, engines: int, rates: Rates) -> float:
    """Return the seconds to read the prompts and to decode the texts.

    Prompts are limited by products; texts that share a prompt read it once (prefix caching).
    Decoding is limited by memory: each step reads the weights once and the cache of every running
    text, and waits for two collectives per layer. It takes at least the time of one text of full
    length decoded alone.
    """
    mean_new, prompt = work.new_tokens * rates.mean_length, work.prompt_tokens * rates.mean_length
    context = prompt + mean_new / 2
    flops = forward_flops_per_token(work.model.spec, prompt)
    prefill = (
        work.prompts
        * prompt
        * flops
        / (engines * engine.tensor_parallel * rates.prefill_tflops * 1e12)
    )
    running = max(1, min(engine.running, math.ceil(work.sequences / engines)))

    def step(texts: float) -> float:
        collectives = (
            2 * work.model.spec.num_layers * rates.collective_us / 1e6
            if engine.tensor_parallel > 1
            else 0
        )
        return (
            engine.weights + texts * context * engine.kv_token
        ) / rates.memory_gbs / GB + collectives

    decode = work.sequences / engines / running * mean_new * step(running)
    return prefill + max(decode, work.new_tokens * step(1))


def sync_seconds(total_bytes: int, transport: str, rates: Rates) -> float:
    """Return the seconds to send the model over the network, or to write it to disk and read it."""
    if transport == "disk":
        return 2 * total_bytes / rates.disk_gbs / GB
    return total_bytes / (rates.nvlink_gbs if transport == "tensor" else rates.network_gbs) / GB
