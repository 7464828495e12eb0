"""What the clients of SGLang and vLLM share: HTTP, the limits of a server, and a request's way
there and back.
"""

from .engine import RemoteEngine

__all__ = ["RemoteEngine"]
