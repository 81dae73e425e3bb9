"""Conntrack zones: which 16-bit number stands for which tenant on this node.

The allocation lives in the table itself, as set `tenants` whose elements carry the tenant's uid as comment, and is
written in the transactions of the kernel that use it: table and allocation can never disagree, and whoever lists the
table sees whose zone is whose.

Zone 0 is the super cluster's, always: it is where packets are that nothing marks. The numbers for tenants come from a
range in the middle, because Open vSwitch based networks take theirs from both ends in the same conntrack table (OVN
counts from 1 up, Antrea has 65520 and 65521). A zone is flushed before another tenant gets it, and is given out as late
as possible again.
"""

from collections.abc import Iterable

from vcproxy.backend.protocol import BackendError
from vcproxy.model.tenant import SUPER_UID
from vcproxy_nftables.pools import Numbers, NumbersExhausted

SUPER_ZONE = 0
FIRST = 20_000
LAST = 59_999


class Zones:
    """Hands out zones."""

    def __init__(self, first: int = FIRST, last: int = LAST) -> None:
        """The range for tenants, both inclusive."""
        self._numbers = Numbers(first, last)
        self._size = last - first + 1

    def take(self, uid: str) -> int:
        """A zone for a tenant. Raises BackendError when there is none left."""
        if uid == SUPER_UID:
            return SUPER_ZONE
        try:
            return self._numbers.take()
        except NumbersExhausted:
            raise BackendError(
                f"tenant {uid}: all {self._size} conntrack zones of this node are taken; widen the option `zones`"
            ) from None

    def reserve(self, zones: Iterable[int]) -> None:
        """These are in use already."""
        self._numbers.reserve(zone for zone in zones if zone != SUPER_ZONE)

    def release(self, zone: int) -> None:
        """Give back a zone, whose flows are gone."""
        if zone != SUPER_ZONE:
            self._numbers.release(zone)
