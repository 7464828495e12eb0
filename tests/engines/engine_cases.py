"""Helpers of several engine tests: a tiny Qwen2, requests, a small chat template."""

import asyncio

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from spark_nemo.engines import EngineFailure, GenerationRequest, SamplingParams

VOCAB = 61
CONTEXT = 128
TEMPLATE = (
    "{%- for message in messages %}\n{{ '<|im_start|>' + message.role + '\\n' + message['content'] "
    "| trim }}{{ eos_token }}\n{%- endfor %}\n{%- if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def make_model(seed: int, tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        rope_theta=500.0,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def ask(prompt, **sampling) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), SamplingParams(**{"max_new_tokens": 20, **sampling}))


def named(model):
    """Names and tensors that a trainer would send, without the tied copy of the embedding."""
    return [
        (name, tensor)
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    ]


async def generate_all(engine, requests):
    """Return all results in the order of ``requests``; a failure takes its request's place."""

    async def generate(request):
        try:
            return await engine.generate(request)
        except EngineFailure as failure:
            return failure

    return await asyncio.gather(*(generate(request) for request in requests))
