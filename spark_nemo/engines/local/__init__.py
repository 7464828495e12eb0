"""The embedded engine: a Qwen2 decoder with continuous batching in plain torch."""

from .engine import LocalEngine
from .weights import read_spec

__all__ = ["LocalEngine", "read_spec"]
