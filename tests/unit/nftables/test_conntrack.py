"""Flows are forgotten as kube-proxy forgets them, and never those of another zone."""

import contextlib
import errno
import ipaddress
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from vcproxy_nftables import conntrack, wire
from vcproxy_nftables.conntrack import Conntrack, Support
from vcproxy_nftables.flowcolumns import Target, stale_rows
from vcproxy_nftables.netlink import NetlinkError

pytestmark = pytest.mark.packets

UDP, TCP = socket.IPPROTO_UDP, socket.IPPROTO_TCP


def at(address: str, port: int) -> Target:
    return ipaddress.ip_address(address).packed, port


DNS, DNS6, OTHER = at("10.96.0.10", 53), at("fd00::10", 53), at("10.96.0.11", 53)
A, B, C = at("10.1.0.1", 53), at("10.1.0.2", 53), at("10.1.0.3", 5353)
A6, B6 = at("fd01::1", 53), at("fd01::2", 53)


@pytest.fixture
def tracker(namespace: None) -> Iterator[Conntrack]:
    with contextlib.closing(Conntrack()) as made:
        made._channel.request(kind=conntrack._DELETE, family=socket.AF_UNSPEC)  # the namespace is the test's own
        yield made


class Clients:
    """Makes flows of ever new clients."""

    def __init__(self, tracker: Conntrack) -> None:
        self._channel = tracker._channel
        self._count = 0

    def dial(
        self, destination: Target, endpoint: Target, *, zone: int = 0, flat: bool = False, protocol: int = UDP
    ) -> None:
        """One flow, translated to the endpoint; `flat`: with the zone in the original direction only."""
        self._count += 1
        prefix = bytes([172, 16]) if len(destination[0]) == 4 else bytes([0xFD, 2, *bytes(12)])
        client = prefix + struct.pack(">H", self._count), 40_000
        own_zone = wire.attribute(conntrack.TUPLE_ZONE, struct.pack(">H", zone)) if flat else b""
        payload = (
            conntrack._tuple(conntrack.TUPLE_ORIG, protocol, client, destination, own_zone)
            + conntrack._tuple(conntrack.TUPLE_REPLY, protocol, endpoint, client)
            + wire.attribute(conntrack._TIMEOUT, struct.pack(">I", 600))
            + (b"" if flat else conntrack._zone(zone))
        )
        if protocol == TCP:
            payload += wire.nest(4, wire.nest(1, wire.attribute(1, b"\3")))  # CTA_PROTOINFO: established
        family = socket.AF_INET if len(destination[0]) == 4 else socket.AF_INET6
        flags = wire.NLM_F_CREATE | wire.NLM_F_EXCL
        _, verdict = self._channel.request(kind=conntrack._NEW, family=family, payload=payload, flags=flags)
        assert verdict.error == 0, errno.errorcode[verdict.error]


@pytest.fixture
def clients(tracker: Conntrack) -> Clients:
    return Clients(tracker)


def flows(
    tracker: Conntrack, zone: int, *, protocol: int, family: int, destination: Target | None = None
) -> list[conntrack.Flow]:
    """A zone's flows of a protocol and family, perhaps only those dialled to a destination."""
    return [
        flow
        for flow in tracker._flows(family, conntrack._filter(zone, protocol, destination, None))
        if flow.zone == zone and flow.protocol == protocol and destination in (None, flow.destination)
    ]


def count(tracker: Conntrack, zone: int, *, protocol: int = UDP, destination: Target | None = None) -> int:
    families: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)
    if destination is not None:
        families = (socket.AF_INET,) if len(destination[0]) == 4 else (socket.AF_INET6,)
    return sum(
        len(flows(tracker, zone, protocol=protocol, family=family, destination=destination)) for family in families
    )


def test_this_kernel_honours_zones_and_filters_and_the_probe_leaves_nothing(tracker: Conntrack) -> None:
    assert tracker.probe() == Support(zones=True, filters=True)
    for zone in (0, 65_534, 65_535):
        assert count(tracker, zone) == 0


def test_a_flow_is_read_as_it_was_made(tracker: Conntrack, clients: Clients) -> None:
    clients.dial(DNS, A, zone=7)
    clients.dial(DNS, C, zone=8, flat=True)
    (overlay,) = flows(tracker, 7, protocol=UDP, family=socket.AF_INET)
    (flat,) = flows(tracker, 8, protocol=UDP, family=socket.AF_INET, destination=DNS)
    assert overlay[:5] == (7, UDP, at("172.16.0.1", 40_000), DNS, A)
    assert flat[:5] == (8, UDP, at("172.16.0.2", 40_000), DNS, C)


@pytest.mark.parametrize("support", [None, Support(zones=False, filters=False)], ids=["filters", "older kernel"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("zone", [0, 7, 65_000])
def test_flushing_a_zone_forgets_all_of_it_and_nothing_else(
    zone: int, flat: bool, support: Support | None, tracker: Conntrack, clients: Clients
) -> None:
    for each in (0, 7, 8, 65_000):
        for destination, endpoint in ((DNS, A), (DNS6, A6), (OTHER, OTHER)):
            clients.dial(destination, endpoint, zone=each, flat=flat and each != 0)
            clients.dial(destination, endpoint, zone=each, flat=flat and each != 0, protocol=TCP)
    tracker._support = support
    tracker.flush_zone(zone)
    for each in (0, 7, 8, 65_000):
        left = 0 if each == zone else 3
        assert count(tracker, each) == left
        assert count(tracker, each, protocol=TCP) == left
    tracker.flush_zone(zone)


@pytest.mark.parametrize("flat", [False, True])
def test_flows_of_several_zones_are_forgotten_and_only_to_what_was_named(
    flat: bool, tracker: Conntrack, clients: Clients
) -> None:
    for zone in (7, 8, 9):
        for endpoint in (A, A, B, C):
            clients.dial(DNS, endpoint, zone=zone, flat=flat)
        clients.dial(OTHER, A, zone=zone, flat=flat)
        clients.dial(at("10.96.0.10", 54), A, zone=zone, flat=flat)
        clients.dial(DNS, A, zone=zone, flat=flat, protocol=TCP)
    assert tracker.reconcile(zones={7, 9}, protocol=UDP, serving={DNS: {B, C}}) == 4
    assert tracker.reconcile(zones={7, 9}, protocol=UDP, serving={DNS: {B, C}}) == 0
    assert tracker.reconcile(zones={7, 9}, protocol=UDP, serving={DNS: set()}) == 4
    for zone, udp in ((7, 2), (8, 6), (9, 2)):
        assert (count(tracker, zone), count(tracker, zone, protocol=TCP)) == (udp, 1)


@pytest.mark.parametrize(
    ("serving", "gone", "left"),
    [
        ({DNS: {A}}, 2, {DNS: 2, OTHER: 2, DNS6: 2}),
        ({DNS: {A, B, C}}, 1, {DNS: 3, OTHER: 2, DNS6: 2}),
        ({DNS: set()}, 4, {DNS: 0, OTHER: 2, DNS6: 2}),
        ({DNS: {A}, OTHER: {B}}, 3, {DNS: 2, OTHER: 1, DNS6: 2}),
        ({DNS: {A}, DNS6: {A6}}, 3, {DNS: 2, OTHER: 2, DNS6: 1}),
        ({at("10.96.0.99", 53): set()}, 0, {DNS: 4, OTHER: 2, DNS6: 2}),
        ({}, 0, {DNS: 4, OTHER: 2, DNS6: 2}),
        ({DNS: {A}} | {at(f"10.97.0.{n}", 53): {A} for n in range(9)}, 2, {DNS: 2, OTHER: 2, DNS6: 2}),
    ],
    ids=["one", "all serve", "no endpoint", "two", "both families", "unknown", "none", "many"],
)
@pytest.mark.parametrize("flat", [False, True])
def test_flows_whose_endpoint_no_longer_serves_are_forgotten(
    flat: bool,
    serving: dict[Target, set[Target]],
    gone: int,
    left: dict[Target, int],
    tracker: Conntrack,
    clients: Clients,
) -> None:
    for zone in (7, 8):
        for destination, endpoint in ((DNS, A), (DNS, A), (DNS, B), (OTHER, B), (OTHER, OTHER), (DNS6, A6), (DNS6, B6)):
            clients.dial(destination, endpoint, zone=zone, flat=flat)
        clients.dial(DNS, DNS, zone=zone, flat=flat)  # began before there was an endpoint
    assert tracker.reconcile(zones={7}, protocol=UDP, serving=serving) == gone
    assert {destination: count(tracker, 7, destination=destination) for destination in left} == left
    assert count(tracker, 8) == 8


@pytest.mark.parametrize("support", [None, Support(zones=False, filters=False)], ids=["filters", "older kernel"])
@pytest.mark.parametrize(
    ("service", "other", "gone", "stays"),
    [(DNS, OTHER, A, B), (DNS6, at("fd00::11", 53), A6, B6)],
    ids=["IPv4", "IPv6"],
)
def test_the_many_flows_of_one_endpoint_are_forgotten_alike(
    service: Target,
    other: Target,
    gone: Target,
    stays: Target,
    support: Support | None,
    tracker: Conntrack,
    clients: Clients,
) -> None:
    for _ in range(conntrack._MANY + 1):
        clients.dial(service, gone, zone=7)
    for _ in range(3):
        clients.dial(service, stays, zone=7)
        clients.dial(service, gone, zone=8)
        clients.dial(other, gone, zone=7)
    tracker._support = support
    assert tracker.reconcile(zones={7}, protocol=UDP, serving={service: {stays}}) == conntrack._MANY + 1
    left = count(tracker, 7, destination=service), count(tracker, 7, destination=other), count(tracker, 8)
    assert left == (3, 3, 3)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_columns_find_what_reading_flow_by_flow_finds(
    family: socket.AddressFamily, tracker: Conntrack, clients: Clients
) -> None:
    """Of flows of every layout that the kernel has for them, in any mixture."""
    chance = random.Random(family)
    lead = "10.96.0." if family == socket.AF_INET else "fd00::"
    services, endpoints = ([at(f"{lead}{first + n}", 53 + n % 2) for n in range(4)] for first in (10, 60))
    for _ in range(400):
        destination = chance.choice(services)
        clients.dial(
            destination,
            chance.choice((destination, *endpoints)),
            zone=chance.choice((0, 7, 8, 9)),
            flat=chance.random() < 0.5,
            protocol=chance.choice((UDP, UDP, TCP)),
        )
    serving: dict[Target, set[Target]] = {
        destination: set(chance.sample(endpoints, chance.randint(0, 3))) for destination in services[1:]
    }
    replies = tracker._replies(family, b"")
    for zones in ({0}, {7}, {8, 9}, {0, 7, 8, 9}, set[int]()):
        expected = [
            row
            for row, flow in enumerate(map(conntrack._flow, replies))
            if flow.zone in zones
            and flow.protocol == UDP
            and flow.reply_source not in serving.get(flow.destination, {flow.reply_source})
        ]
        assert sorted(stale_rows(replies, zones, UDP, serving)) == expected
    assert stale_rows([], {0}, UDP, serving) == []


@pytest.mark.parametrize("zone", [-1, 65_536])
def test_a_zone_has_16_bits(zone: int, tracker: Conntrack) -> None:
    with pytest.raises(ValueError, match="no conntrack zone"):
        tracker.flush_zone(zone)


def test_what_the_kernel_refuses_is_raised(tracker: Conntrack) -> None:
    with pytest.raises(NetlinkError, match="cannot delete a flow: EINVAL") as caught:
        tracker._delete(socket.AF_INET, conntrack._tuple(conntrack.TUPLE_ORIG, UDP, None, DNS))
    assert caught.value.errno == errno.EINVAL
