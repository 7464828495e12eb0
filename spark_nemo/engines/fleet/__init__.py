"""Many engines as one that survives the death of any of them."""

from .fleet import Fleet
from .limits import FleetLimits
from .member import Front, Keeper, MemberState
from .metrics import FleetMetrics
from .weights import WeightUpdate

__all__ = ["Fleet", "FleetLimits", "FleetMetrics", "Front", "Keeper", "MemberState", "WeightUpdate"]
