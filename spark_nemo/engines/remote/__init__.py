"""What the clients of SGLang and vLLM share: HTTP, the limits of a server, and a request's way there and back."""

from .engine import RemoteEngine
from .limits import ServerLimits

__all__ = ["RemoteEngine", "ServerLimits"]
