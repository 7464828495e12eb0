"""SGLang over HTTP: one server as an engine, its protocol, control calls, pool and router."""

from .protocol import PauseMode
from .server import SglangServer

__all__ = ["PauseMode", "SglangServer"]
