"""SGLang over HTTP: one server as an engine, its protocol and its control calls."""

from ..remote import ServerLimits
from .protocol import PauseMode
from .server import SglangServer

__all__ = ["PauseMode", "ServerLimits", "SglangServer"]
