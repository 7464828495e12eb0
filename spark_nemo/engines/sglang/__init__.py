"""SGLang over HTTP: one server as an engine, its protocol and its control calls."""

from .protocol import PauseMode
from .server import SglangServer

__all__ = ["PauseMode", "SglangServer"]
