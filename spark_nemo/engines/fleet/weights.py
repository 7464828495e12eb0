"""One weight update of a fleet: who it is for, who failed, and what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..base import Engine, EngineFailure, EngineUnavailable
from .member import Member


@dataclass(slots=True)
class WeightUpdate:
    """``targets`` must be brought to ``version``; who fails is taken out of the fleet."""

    version: int
    targets: dict[Engine, str]
    """Engine -> the member's name."""
    errors: dict[Engine, EngineFailure] = field(default_factory=dict)

    def failed(self, engine: Engine, error: EngineFailure) -> None:
        """``engine`` may have any mixture of old and new weights now (or, for a refusal by all, the old ones)."""
        self.errors[engine] = error


def settle(update: WeightUpdate, members: Sequence[Member], fleet_name: str) -> None:
    """Record what every member of the update has now. Raises ``EngineFailure`` when none took the weights."""
    # A server that was restarted meanwhile has the folder's weights, whatever its predecessor took.
    members = [member for member in members if member.engine in update.targets]
    failed = {m: update.errors[m.engine] for m in members if m.engine in update.errors}
    # A refusal (wrong names or shapes) by all leaves the old weights whole and every member fit.
    refused = len(failed) == len(members) and not any(isinstance(e, EngineUnavailable) for e in failed.values())
    for member in members:
        if member in failed and not refused:
            spoil(member, f"weights version {update.version}: {failed[member]}")
        elif member not in failed:
            member.version = update.version
            member.wake.set()
    if len(failed) == len(members):
        raise EngineFailure(f"weights version {update.version} reached no server of the {fleet_name}: "
                            + ("; ".join(f"{m.name}: {error}" for m, error in failed.items()) or "all died"))


def spoil(member: Member, reason: str) -> None:
    """Nobody knows what its weights are: take it out until it is given some."""
    member.version = None
    member.condemn(reason)
