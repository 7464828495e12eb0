"""vLLM over HTTP, for generation, verification and evaluation. Its limits are in ``VllmServer``'s
docstring.
"""

from .launch import server_command, server_environment
from .server import VllmServer

__all__ = ["VllmServer", "server_command", "server_environment"]
