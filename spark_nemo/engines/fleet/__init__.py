"""A fleet of engines behind the ``Engine`` interface that survives the death of any of them."""

from .fleet import Fleet, FleetMetrics, WeightUpdate
from .replica import TOKEN_TIMEOUT_S, FleetLimits, ReplicaState, RouterHandle, ServerLauncher

__all__ = [
    "TOKEN_TIMEOUT_S",
    "Fleet",
    "FleetLimits",
    "FleetMetrics",
    "ReplicaState",
    "RouterHandle",
    "ServerLauncher",
    "WeightUpdate",
]
