"""Llama 2 and 3.x: no biases; from 3.1 on, rotary frequencies stretched for longer contexts."""

from __future__ import annotations

from .decoder import dense
from .table import Family

LLAMA = Family("llama", dense, rope_types=("default", "llama3"))
