"""Which member serves a prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .replica import Replica

_REMEMBERED_PROMPTS = 100_000


class PrefixRouting:
    """The idlest member, except that a prompt seen before goes where it was while that one has at
    most ``slack`` requests more: the N verifications of a solution find their prompt in the prefix
    cache.
    """

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._homes: OrderedDict[int, Replica] = OrderedDict()
        self._turn = 0

    def choose(
        self, prompt_ids: tuple[int, ...], up: Sequence[Replica], avoid: Replica | None
    ) -> Replica:
        """One of ``up`` (not empty); ``avoid`` and suspected members only when there is no other."""
        trusted = (
            [m for m in up if not m.suspected and m is not avoid]
            or [m for m in up if m is not avoid]
            or up
        )
        idlest = min(trusted, key=lambda member: (member.load, member.last_used))
        key = hash(prompt_ids)
        home = self._homes.get(key)
        if home is None or home not in trusted or home.load > idlest.load + self._slack:
            home = idlest
        self._homes[key] = home
        self._homes.move_to_end(key)
        if len(self._homes) > _REMEMBERED_PROMPTS:
            self._homes.popitem(last=False)
        self._turn += 1
        home.last_used = self._turn
        return home
