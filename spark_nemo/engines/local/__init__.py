"""The embedded engine: a Qwen2 decoder with continuous batching in plain torch."""

from .engine import LocalEngine
from .weights import Qwen2Shape

__all__ = ["LocalEngine", "Qwen2Shape"]
