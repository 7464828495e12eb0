"""vLLM over HTTP, for generation, verification and evaluation; ``server.py`` lists its limits."""

from .launch import server_command, server_environment
from .server import VllmServer

__all__ = ["VllmServer", "server_command", "server_environment"]
