"""What a fleet counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class FleetMetrics:
    """Totals since the start, and the load of this moment. Tokens that a dead server had sampled
    are not known.
    """

    requests: int = 0
    answered: int = 0
    refused: int = 0
    """Ended with an ``EngineFailure``: bad requests, and those given up."""
    cancelled: int = 0
    retries: int = 0
    redone_prompt_tokens: int = 0
    """Prompt tokens sent once more because an attempt failed."""
    lost_response_tokens: int = 0
    """Sampled tokens thrown away, where known: aborted and late answers."""
    late_answers: int = 0
    """Answers of members that had been given up; dropped."""
    outages: int = 0
    restarts: int = 0
    members: int = 0
    members_up: int = 0
    load: dict[str, int] = field(default_factory=dict)
    """Requests in flight by member."""

    def line(self) -> str:
        """For the log."""
        return (
            f"{self.members_up} of {self.members} members up, {self.requests} requests, {self.answered} answered, "
            f"{self.retries} redone ({self.redone_prompt_tokens} prompt tokens again), {self.outages} outages, "
            f"{self.restarts} restarts, in flight {self.load}"
        )
