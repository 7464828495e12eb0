"""Rotary frequencies as transformers computes them, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spark_nemo.models.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Radians per position ``[head_dim / 2]``, slowest last.

    ``theta^(-2k / head_dim)`` (Su et al., 2021, arXiv:2104.09864). Llama 3's stretch, as in
    transformers' modeling_rope_utils.py: with c original positions, a wavelength above c /
    low_freq_factor grows by ``factor``, one below c / high_freq_factor stays, and between them the
    two are mixed linearly in c / wavelength. megatron-core has this too, but with 1, 4 and 8192 for
    the three constants whatever config.json says.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    plain = 1.0 / spec.rope_theta**exponents
    stretch = spec.rope_scaling
    if stretch is None:
        return plain
    turns = stretch.original_max_positions / (2 * math.pi / plain)
    kept = (turns - stretch.low_freq_factor) / (stretch.high_freq_factor - stretch.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / stretch.factor + kept * plain
