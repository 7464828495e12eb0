"""Many engines as one that survives the death of any of them."""

from .fleet import Fleet
from .limits import FleetLimits
from .metrics import FleetMetrics
from .replica import ReplicaState, RouterHandle, ServerLauncher
from .weights import WeightUpdate

__all__ = [
    "Fleet",
    "FleetLimits",
    "FleetMetrics",
    "ReplicaState",
    "RouterHandle",
    "ServerLauncher",
    "WeightUpdate",
]
