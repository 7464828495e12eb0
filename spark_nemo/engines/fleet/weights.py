"""One weight update of a fleet: who it is for, who failed, and what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..base import Engine, EngineFailure, EngineUnavailable
from .replica import Replica, ReplicaState


@dataclass(slots=True)
class WeightUpdate:
    """``targets`` must be brought to ``version``; who fails is taken out of the fleet."""

    version: int
    targets: dict[Engine, str]
    """Engine -> the member's name."""
    errors: dict[Engine, EngineFailure] = field(default_factory=dict)

    def failed(self, engine: Engine, error: EngineFailure) -> None:
        """``engine`` may have any mixture of old and new weights now (or, for a refusal by all, the
        old ones).
        """
        self.errors[engine] = error


def settle(update: WeightUpdate, members: Sequence[Replica], fleet_name: str) -> None:
    """Record what every member of the update has now. Raises when none took the weights:
    ``EngineUnavailable`` when all were lost, so that it can be repeated with whoever returns, else
    ``EngineFailure``.
    """
    # A server that was restarted meanwhile has the folder's weights, whatever its predecessor took.
    members = [member for member in members if member.engine in update.targets]
    failed = {m: update.errors[m.engine] for m in members if m.engine in update.errors}
    # So has one that died after it took them.
    failed |= {
        m: EngineUnavailable(m.last_error)
        for m in members
        if m not in failed and not m.takes_weights
    }
    lost = [isinstance(error, EngineUnavailable) for error in failed.values()]
    # A refusal (wrong names or shapes) by all leaves the old weights whole and every member fit.
    refused = len(failed) == len(members) and not any(lost)
    for member in members:
        if member in failed and not refused:
            spoil(member, f"weights version {update.version}: {failed[member]}")
        elif member not in failed:
            member.version = update.version
            member.wake.set()
    if len(failed) == len(members):
        why = "; ".join(f"{m.name}: {error}" for m, error in failed.items()) or "all died"
        raise (EngineUnavailable if all(lost) else EngineFailure)(
            f"weights version {update.version} reached no server of the {fleet_name}: {why}"
        )


def spoil(member: Replica, reason: str) -> None:
    """Nobody knows what its weights are: take it out until it is given some."""
    member.version = None
    member.condemn(reason)


def outlook(members: Sequence[Replica]) -> str:
    """Why ``members`` are out, and what has to happen before each serves again."""

    def one(member: Replica) -> str:
        if member.state is ReplicaState.FAILED:
            how = "is given up"
        elif member.keeper is None:
            how = "returns when whoever runs it starts it again"
        else:
            how = f"is started again ({len(member.restarts)} of {member.keeper.max_restarts} restarts used)"
        return f"{member.name} {how}; it is out: {member.last_error}"

    return "; ".join(map(one, members))
