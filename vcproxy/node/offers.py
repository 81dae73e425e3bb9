"""Which stream feeds which tenant, where brains share them: one at a time, the one that offered it last.

A shard moves while streams stand. Its old holder may not know yet, or stand still with messages under way that are
older than what the new one sends. So a stream *offers* a tenant (TenantAdded.asks) before it sends anything of it, and
from then on the node listens to that stream alone; what others go on to say of the tenant is not heard. When the feeder
releases it or its stream ends, whoever else had offered it is asked to do so again.

Tenants are never removed because nobody offers them: their API servers may be away, their shard may be between brains.
They are removed when the leading stream does not name them, and nobody offers them.
"""

from collections.abc import Callable
from typing import Protocol

from vcproxy.node.holdings import Holdings


class Offerer(Protocol):
    """A stream that may feed tenants."""

    def ask(self, uid: str) -> None:
        """Have the brain offer the tenant anew, if it still has it."""


class Offers:
    """Of all content streams of a node. `removed` is called with a tenant that has left the holdings."""

    def __init__(self, holdings: Holdings, removed: Callable[[str], None]) -> None:
        self._holdings = holdings
        self._removed = removed
        self._offers: dict[str, list[Offerer]] = {}  # the last one feeds
        self._brains: dict[str, Offerer] = {}
        self._named: frozenset[str] | None = None

    def enter(self, brain: str, by: Offerer) -> bool:
        """A stream to this brain stands; False: another one does already."""
        return self._brains.setdefault(brain, by) is by

    def feeder(self, uid: str) -> Offerer | None:
        """The stream that the node listens to."""
        found = self._offers.get(uid)
        return found[-1] if found else None

    def fed(self, by: Offerer) -> int:
        """How many tenants the stream feeds."""
        return sum(1 for found in self._offers.values() if found[-1] is by)

    def offered(self, uid: str, by: Offerer) -> None:
        """The stream feeds the tenant from now on."""
        found = self._offers.setdefault(uid, [])
        if by in found:
            found.remove(by)
        found.append(by)

    def released(self, uid: str, by: Offerer) -> None:
        """It does not any more."""
        found = self._offers.get(uid, [])
        if by not in found:
            return
        feeds = found[-1] is by
        found.remove(by)
        others = list(found)
        if feeds or not found:
            del self._offers[uid]
        for other in others if feeds else ():
            other.ask(uid)
        self._settle(uid)

    def closed(self, by: Offerer) -> None:
        """The stream has ended."""
        for brain in [brain for brain, stream in self._brains.items() if stream is by]:
            del self._brains[brain]
        for uid in [uid for uid, found in self._offers.items() if by in found]:
            self.released(uid, by)

    def name(self, uids: frozenset[str] | None) -> None:
        """The leading stream names all tenants of this node; None: there is no such word now."""
        self._named = uids
        for uid in list(self._holdings):
            self._settle(uid)

    @property
    def missing(self) -> int:
        """How many of the tenants named the node has not all of."""
        held = self._holdings.tenants
        return sum(1 for uid in self._named or () if uid not in held or not held[uid].synced)

    def _settle(self, uid: str) -> None:
        if self._named is None or uid in self._named or uid in self._offers:
            return
        if self._holdings.drop(uid) is not None:
            self._removed(uid)
