"""How patient a fleet is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from spark_nemo.config.engine import POOL_DOWN_TIMEOUT_S

TOKEN_TIMEOUT_S = 0.25
"""For each token that may be sampled, when nothing is configured: a full server samples one of a
large model in less than a tenth of a second for each of its requests, and as many again wait there.
"""


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """Bounds of a fleet; times in seconds. While the fleet is paused, or its event loop does not
    run, none of the ``request``, ``total``, ``probe`` and ``lost`` times pass.
    """

    request_timeout_s: float = 600.0
    """One attempt of one request; after it the member is probed and the request goes elsewhere."""
    token_timeout_s: float = 0.0
    """So much longer for each token that the request may sample."""
    total_timeout_s: float = 3600.0
    """All attempts of one request together, longer with its tokens as one attempt is. Waiting for a
    place at a member is part of neither.
    """
    max_attempts: int = 4
    backoff_s: float = 0.1
    """Before the second attempt, and before a lost member is tried again; doubles each time."""
    max_backoff_s: float = 30.0
    failures_to_remove: int = 3
    """So many requests in a row that a member could not serve take it out, even when it answers
    probes.
    """
    probe_every_s: float = 10.0
    probe_timeout_s: float = 30.0
    pool_down_timeout_s: float = POOL_DOWN_TIMEOUT_S
    """How long requests and updates wait when no member is up and none is starting; then the fleet
    is lost.
    """
    control_timeout_s: float = 60.0
    """Pause, resume, health and close of one member (wall clock)."""
    update_timeout_s: float = 1800.0
    """New weights for one member (wall clock)."""
    affinity_slack: int = 16
    """A prompt goes where it was before while that member has at most so many requests more than
    the idlest.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                value <= 0 and field.name not in ("affinity_slack", "token_timeout_s")
            ) or value < 0:
                raise ValueError(f"FleetLimits.{field.name}={value}: must be positive")
        if self.total_timeout_s < self.request_timeout_s:
            raise ValueError(
                f"FleetLimits.total_timeout_s={self.total_timeout_s}: must be at least "
                f"request_timeout_s={self.request_timeout_s}"
            )

    @property
    def tick_s(self) -> float:
        """The resolution of the clock that these times are measured with."""
        return min(
            0.25,
            0.2
            * min(
                self.request_timeout_s,
                self.probe_timeout_s,
                self.probe_every_s,
                self.pool_down_timeout_s,
            ),
        )

    def deadlines(self, max_new_tokens: int) -> tuple[float, float]:
        """For one attempt of a request that may sample so many tokens, and for all of them."""
        attempt = self.request_timeout_s + self.token_timeout_s * max_new_tokens
        return attempt, self.total_timeout_s * attempt / self.request_timeout_s

    def backoff(self, failures: int) -> float:
        """The pause after so many failures in a row (1 = the first)."""
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(failures - 1, 32))
