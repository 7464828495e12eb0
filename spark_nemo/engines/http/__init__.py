"""The HTTP client that SGLang and vLLM servers share."""

from .engine import RemoteEngine

__all__ = ["RemoteEngine"]
