"""Rotary frequencies as transformers computes them, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spark_nemo.models.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Return radians per position ``[head_dim / 2]``, slowest last.

    ``theta^(-2k / head_dim)`` (Su et al., 2021, arXiv:2104.09864), with Llama 3's scaling as in
    transformers' modeling_rope_utils.py. With c original positions, a wavelength above
    c / low_freq_factor grows by ``factor``, one below c / high_freq_factor stays, and between them
    the two are mixed linearly in c / wavelength.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    plain = 1.0 / spec.rope_theta**exponents
    # megatron-core scales, too, but with 1, 4 and 8192 whatever config.json says.
    scaling = spec.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_max_positions / (2 * math.pi / plain)
    unscaled_share = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    unscaled_share = unscaled_share.clamp(0, 1)
    return (1 - unscaled_share) * plain / scaling.factor + unscaled_share * plain
