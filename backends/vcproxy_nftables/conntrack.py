"""Flows in the kernel's connection tracking: forget those of a zone, or those that go to endpoints that are gone.

A UDP flow has no end that the kernel could see, so a client that keeps sending keeps its translation: it would reach an
endpoint that is gone, for ever. kube-proxy's rule (pkg/proxy/conntrack, CleanStaleEntries) is followed: of the flows to
a service's address, all go whose replies come from somewhere that is not serving. That includes flows that were never
translated, which began before the service had an endpoint. TCP flows are left alone; they end by themselves.

The table may hold millions of flows of everybody on the node. So the kernel is asked for the few that matter
(CTA_FILTER, since Linux 5.8; by zone since 6.8), what it returns is checked here once more (an older kernel ignores
what it does not know), and each stale flow is deleted by its own tuple, zone and id: nothing else can be hit, and the
count is exact. Where one endpoint leaves very many behind, one filtered delete (since 6.11) takes them all.

**A delete without a tuple or a filter that the kernel understands empties the whole table.** `probe` finds out without
any risk: filters for dump and flush are the same code (ctnetlink_needs_filter, ctnetlink_filter_match), so a flow of
our own is made in a zone nobody uses, between documentation addresses (RFC 5737), and the *dump* of another zone must
leave it out. Without that, a zone is flushed flow by flow.

**IPv6 addresses are never given to the kernel as a filter**: ctnetlink_filter_match_tuple compares them the wrong way
round (seen in Linux 6.18: a dump tells all flows *but* those asked for, and a filtered delete would spare just those).
IPv6 flows are asked for by zone, protocol and port, and deleted one by one.

Zones: an overlay tenant's flows have the zone in both directions (CTA_ZONE), a flat one's in the original direction
only (CTA_TUPLE_ZONE in the original tuple). Filters by zone match both (nf_ct_zone_equal_any).
"""

import errno
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import NamedTuple, NoReturn

from vcproxy_nftables import wire
from vcproxy_nftables.flowcolumns import (
    DESTINATION,
    ID,
    PROTO_DST_PORT,
    PROTO_NUM,
    PROTO_SRC_PORT,
    SOURCE,
    TUPLE_IP,
    TUPLE_ORIG,
    TUPLE_PROTO,
    TUPLE_REPLY,
    TUPLE_ZONE,
    ZONE,
    Target,
    stale_rows,
)
from vcproxy_nftables.wire import Answer, Channel, NetlinkError, Reply, attributes

_NEW, _GET, _DELETE = (1 << 8 | kind for kind in (0, 1, 2))  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_*
_TIMEOUT, _FILTER = 7, 25
_ORIG_FLAGS, _REPLY_FLAGS = 1, 2
# net/netfilter/nf_internals.h CTA_FILTER_F_*
_BY_SOURCE, _BY_DESTINATION, _BY_PROTOCOL, _BY_SRC_PORT, _BY_DST_PORT = 1 << 0, 1 << 1, 1 << 3, 1 << 4, 1 << 5

_MANY = 256  # flows of one endpoint, from which on one delete that scans the table is cheaper than one for each
_SINGLE_DUMPS = 4  # destinations, up to which each is asked for by itself
_PROBE_ZONE, _OTHER_ZONE = 65_535, 65_534
_PROBE_SOURCE, _PROBE_DESTINATION = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
_PROBE_SECONDS = 5


class Support(NamedTuple):
    """What the kernel honours. `zones`: CTA_ZONE as a filter; `filters`: CTA_FILTER in dumps."""

    zones: bool
    filters: bool


class Flow(NamedTuple):
    """One entry. `zone`: of the original direction. `handle`: the attributes that name it for a delete."""

    zone: int
    protocol: int
    source: Target
    destination: Target
    reply_source: Target
    handle: bytes


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def _zone(zone: int) -> bytes:
    if not 0 <= zone <= 0xFFFF:
        raise ValueError(f"{zone} is no conntrack zone: need 0..65535")
    return wire.attribute(ZONE, struct.pack(">H", zone))


def _tuple(kind: int, protocol: int, source: Target | None, destination: Target | None, zone: bytes = b"") -> bytes:
    """CTA_TUPLE_ORIG or _REPLY with what is given."""
    addresses = b""
    ports = wire.attribute(PROTO_NUM, bytes([protocol]))
    for end, by_octets, port in ((source, SOURCE, PROTO_SRC_PORT), (destination, DESTINATION, PROTO_DST_PORT)):
        if end is not None:
            addresses += wire.attribute(by_octets[len(end[0])], end[0])
            ports += wire.attribute(port, struct.pack(">H", end[1]))
    nested = wire.nest(TUPLE_IP, addresses) if addresses else b""
    return wire.nest(kind, nested, wire.nest(TUPLE_PROTO, ports), zone)


def _filter(zone: int | None, protocol: int, destination: Target | None, reply_source: Target | None) -> bytes:
    """A zone's flows (None: all zones') of a protocol, to a destination, answered by a source; of IPv6 ones, only the
    ports are heeded.
    """
    original, reply = _BY_PROTOCOL, 0
    if destination:
        original |= _BY_DST_PORT | (_BY_DESTINATION if len(destination[0]) == 4 else 0)
    octets = (b"" if zone is None else _zone(zone)) + _tuple(TUPLE_ORIG, protocol, None, destination)
    if reply_source:
        reply = _BY_PROTOCOL | _BY_SRC_PORT | (_BY_SOURCE if len(reply_source[0]) == 4 else 0)
        octets += _tuple(TUPLE_REPLY, protocol, reply_source, None)
    flags = (wire.attribute(_ORIG_FLAGS, struct.pack("=I", original)),)
    return octets + wire.nest(_FILTER, *flags, wire.attribute(_REPLY_FLAGS, struct.pack("=I", reply)))


def _ends(data: bytes, start: int, end: int) -> tuple[int, Target, Target, int]:
    """(protocol, source, destination, CTA_TUPLE_ZONE or 0) of a tuple."""
    source = destination = b""
    protocol = source_port = destination_port = zone = 0
    for kind, first, last in attributes(data, start, end):
        if kind == TUPLE_IP:
            for inner, at, to in attributes(data, first, last):
                if inner in SOURCE.values():
                    source = data[at:to]
                else:
                    destination = data[at:to]
        elif kind == TUPLE_PROTO:
            for inner, at, to in attributes(data, first, last):
                value = int.from_bytes(data[at:to], "big")
                if inner == PROTO_NUM:
                    protocol = value
                elif inner == PROTO_SRC_PORT:
                    source_port = value
                elif inner == PROTO_DST_PORT:
                    destination_port = value
        elif kind == TUPLE_ZONE:
            zone = int.from_bytes(data[first:last], "big")
    return protocol, (source, source_port), (destination, destination_port), zone


def _flow(reply: Reply) -> Flow:
    handle = b""
    protocol = zone = 0
    source = destination = reply_source = (b"", 0)
    for kind, start, end in attributes(reply.data, reply.start, reply.end):
        if kind == TUPLE_ORIG:
            protocol, source, destination, own_zone = _ends(reply.data, start, end)
            zone = zone or own_zone
            handle += wire.attribute(kind | wire.NESTED, reply.data[start:end])
        elif kind == TUPLE_REPLY:
            _, reply_source, _, _ = _ends(reply.data, start, end)
        elif kind == ZONE:
            zone = int.from_bytes(reply.data[start:end], "big")
            handle += wire.attribute(kind, reply.data[start:end])
        elif kind == ID:
            handle += wire.attribute(kind, reply.data[start:end])
    return Flow(zone, protocol, source, destination, reply_source, handle)


class Conntrack:
    """The flows of the network namespace it is opened in. Methods may be called from any thread.

    They raise NetlinkError and OSError; ValueError for a zone out of range.
    """

    def __init__(self) -> None:
        """Opens a socket; asks nothing yet."""
        self._channel = Channel()
        self._support: Support | None = None

    def close(self) -> None:
        """Close the socket."""
        self._channel.close()

    def probe(self) -> Support:
        """Find out what the kernel honours, once; harmless: see the module. Done by itself before the first flush."""
        if self._support is None:
            there = (_PROBE_SOURCE, 9), (_PROBE_DESTINATION, 9)
            original = _tuple(TUPLE_ORIG, socket.IPPROTO_UDP, *there)
            made = (
                original
                + _tuple(TUPLE_REPLY, socket.IPPROTO_UDP, there[1], there[0])
                + _zone(_PROBE_ZONE)
                + wire.attribute(_TIMEOUT, struct.pack(">I", _PROBE_SECONDS))
            )
            _, verdict = self._channel.request(kind=_NEW, family=socket.AF_INET, payload=made, flags=wire.NLM_F_CREATE)
            if verdict.error:
                self._refused("make the probe's flow", verdict)
            try:
                self._support = Support(
                    zones=self._told(_zone(_PROBE_ZONE)) and not self._told(_zone(_OTHER_ZONE)),
                    filters=self._told(_filter(_PROBE_ZONE, socket.IPPROTO_UDP, there[1], None))
                    and not self._told(_filter(_PROBE_ZONE, socket.IPPROTO_UDP, there[0], None)),
                )
            finally:
                self._delete(socket.AF_INET, original + _zone(_PROBE_ZONE))
        return self._support

    def _told(self, payload: bytes) -> bool:
        """Whether a filtered dump tells of the probe's flow."""
        return any(
            flow.zone == _PROBE_ZONE and flow.source[0] == _PROBE_SOURCE
            for flow in self._flows(socket.AF_INET, payload)
        )

    def flush_zone(self, zone: int) -> None:
        """Forget all flows of a zone, both address families and all protocols, so that it may serve another tenant."""
        wanted = _zone(zone)
        if self.probe().zones:
            _, verdict = self._channel.request(kind=_DELETE, family=socket.AF_UNSPEC, payload=wanted)
            if verdict.error not in (0, errno.ENOENT):
                self._refused(f"flush zone {zone}", verdict)
            return
        for family in (socket.AF_INET, socket.AF_INET6):
            self._delete_each(family, (flow for flow in self._flows(family, b"") if flow.zone == zone))

    def reconcile(self, *, zones: Collection[int], protocol: int, serving: Mapping[Target, Set[Target]]) -> int:
        """Forget these zones' flows that were dialled to a key of `serving` and are answered by none of its targets.

        An empty set forgets all flows to its key. Returns how many were forgotten. Each of a few destinations is one
        scan of the table inside the kernel; of many, one scan tells all flows of the protocol. `serving` is asked once
        for each destination that has flows, and of flows that stay only columns are looked at (see flowcolumns).
        """
        count = 0
        zone = next(iter(zones)) if len(zones) == 1 else None
        for family in (socket.AF_INET, socket.AF_INET6):
            mine = [destination for destination in serving if _family(destination[0]) == family]
            asked: Iterable[Target | None] = mine if len(mine) <= _SINGLE_DUMPS else (None,)
            for destination in asked:
                replies = self._replies(family, _filter(zone, protocol, destination, None))
                stale = [_flow(replies[row]) for row in stale_rows(replies, zones, protocol, serving)]
                count += self._forget(protocol, stale)
        return count

    def _flows(self, family: int, payload: bytes) -> Iterator[Flow]:
        return map(_flow, self._replies(family, payload))

    def _replies(self, family: int, payload: bytes) -> list[Reply]:
        replies, verdict = self._channel.dump(kind=_GET, family=family, payload=payload)
        if verdict.error:
            self._refused("read flows", verdict)
        return replies

    def _forget(self, protocol: int, stale: list[Flow]) -> int:
        groups: dict[tuple[int, Target, Target], list[Flow]] = {}
        for flow in stale:
            groups.setdefault((flow.zone, flow.destination, flow.reply_source), []).append(flow)
        count = 0
        for (zone, destination, reply_source), group in groups.items():
            family = _family(destination[0])
            if len(group) >= _MANY and family == socket.AF_INET and self.probe() == (True, True):
                payload = _filter(zone, protocol, destination, reply_source)
                # A kernel without filtered deletes (before 6.11) takes the partial tuple for a whole one: EINVAL.
                _, verdict = self._channel.request(kind=_DELETE, family=family, payload=payload)
                if not verdict.error:
                    count += len(group)
                    continue
            count += self._delete_each(family, group)
        return count

    def _delete_each(self, family: int, stale: Iterable[Flow]) -> int:
        return sum(self._delete(family, flow.handle) for flow in stale)

    def _delete(self, family: int, handle: bytes) -> bool:
        """Delete one flow; False if it ended by itself meanwhile."""
        _, verdict = self._channel.request(kind=_DELETE, family=family, payload=handle)
        if verdict.error not in (0, errno.ENOENT):
            self._refused("delete a flow", verdict)
        return not verdict.error

    @staticmethod
    def _refused(what: str, verdict: Answer) -> NoReturn:
        raise NetlinkError(
            f"conntrack: cannot {what}: {wire.explain(verdict.error)}" + (f" ({verdict.text})" if verdict.text else ""),
            errno=verdict.error,
        )
