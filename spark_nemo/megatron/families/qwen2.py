"""Qwen2, Qwen2.5 and Qwen2.5-Math: biases on q, k and v."""

from __future__ import annotations

from .decoder import dense
from .table import Family

QWEN2 = Family("qwen2", dense, qkv_bias=True)
