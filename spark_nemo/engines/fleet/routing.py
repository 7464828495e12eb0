"""Choice of the replica that serves a prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .replica import Replica

_REMEMBERED_PROMPTS = 100_000


class PrefixRouting:
    """Route to the least loaded replica, but keep a prompt where its prefix is cached.

    A prompt seen before returns to its last replica while that one has at most ``slack`` more
    requests than the least loaded: the N verifications of a solution share one prefix cache.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._last_replica: OrderedDict[int, Replica] = OrderedDict()
        self._turn = 0

    def choose(
        self, prompt_ids: tuple[int, ...], serving: Sequence[Replica], avoid: Replica | None
    ) -> Replica:
        """Return one of ``serving`` (not empty).

        ``avoid`` and suspect replicas are the last choice.
        """
        others = [replica for replica in serving if replica is not avoid]
        trusted = [replica for replica in others if not replica.suspect]
        candidates = trusted or others or serving
        least_loaded = min(candidates, key=lambda replica: (replica.load, replica.last_used))
        key = hash(prompt_ids)
        chosen = self._last_replica.get(key)
        if (
            chosen is None
            or chosen not in candidates
            or chosen.load > least_loaded.load + self._slack
        ):
            chosen = least_loaded
        self._last_replica[key] = chosen
        self._last_replica.move_to_end(key)
        if len(self._last_replica) > _REMEMBERED_PROMPTS:
            self._last_replica.popitem(last=False)
        # Replicas of equal load take turns.
        self._turn += 1
        chosen.last_used = self._turn
        return chosen
