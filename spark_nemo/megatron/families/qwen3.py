"""Qwen3, dense: a norm over every query and key head, no biases, heads whose size is a number of
its own.
"""

from __future__ import annotations

from .decoder import dense
from .table import Family

# Without head_dim transformers would take 128, everyone else hidden_size / num_attention_heads.
QWEN3 = Family("qwen3", dense, qk_norm=True, required=("head_dim",))
