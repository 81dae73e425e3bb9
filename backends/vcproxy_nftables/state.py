"""What the backend holds in memory: the tenants, their ports, and which elements these stand for.

A port's elements are a function of its ForwardedPort and of its pools' numbers and slots, so neither is stored: a
change computes those of before and of after and compares. The memory of a port is its packed targets once more only if
their slots are in another order than the sorted one it came with.
"""

from collections.abc import Iterable, Iterator

from vcproxy.model.addresses import Prefix
from vcproxy.model.forwarding import Action, ForwardedFrontend, ForwardedPort, Masquerade
from vcproxy.model.services import FrontendKind, PortKey
from vcproxy_nftables.changes import Element
from vcproxy_nftables.elements import MapSpec
from vcproxy_nftables.pools import DROP, REJECT, pool_value
from vcproxy_nftables.specs import (
    FAMILY,
    PORT,
    PortSpecs,
    affine_value,
    merge_prefixes,
    number,
    port_field,
    prefix_range,
    target_value,
    zone_field,
    zone_range_field,
)
from vcproxy_nftables.table import learn_chain

WIDTH = {4: 6, 6: 18}
"""Octets of a packed target."""


class Pool:
    """A pool in the kernel: its number, its slots (packed targets in slot order), and, if affine, the timeout and its
    targets' ids."""

    __slots__ = ("ids", "number", "seconds", "slots")

    def __init__(self, number: int, slots: bytes = b"", seconds: int = 0, ids: dict[bytes, int] | None = None) -> None:
        self.number = number
        self.slots = slots
        self.seconds = seconds
        self.ids = ids or {}


class Tenant:
    """A tenant on this node. `lead`: what the keys of its elements begin with. `overlay`: attached by devices of
    its own. `adopted`: the table holds elements of it that an earlier run wrote and this one has not been told about.
    """

    __slots__ = ("adopted", "counts", "lead", "overlay", "ports", "ranges", "uid", "zone")

    def __init__(self, uid: str, zone: int, *, adopted: bool = False) -> None:
        self.uid = uid
        self.zone = zone
        self.lead = zone_field(zone)
        self.adopted = adopted
        self.overlay = False
        self.ports: dict[PortKey, Port] = {}
        self.ranges: tuple[Prefix, ...] = ()
        self.counts: dict[tuple[MapSpec, bytes], int] = {}
        """How many frontends or ports need an element that several may share: virtual_ips and hairpin."""


class Port:
    """A service port as programmed. `pools`: cluster4, cluster6, local4, local6. `blocked`: frontends that it may not
    have now, as positions in `forwarded.frontends`, with the reason."""

    __slots__ = ("blocked", "forwarded", "pools", "tenant")

    def __init__(self, tenant: Tenant, forwarded: ForwardedPort) -> None:
        self.tenant = tenant
        self.forwarded = forwarded
        self.pools: tuple[Pool | None, ...] = (None, None, None, None)
        self.blocked: dict[int, str] = {}


POOLS: tuple[tuple[Action, int], ...] = (
    (Action.CLUSTER, 4),
    (Action.CLUSTER, 6),
    (Action.LOCAL, 4),
    (Action.LOCAL, 6),
)
"""Which is which in Port.pools; see pools_of for the way back."""


def is_public(frontend: ForwardedFrontend) -> bool:
    """True if clients of all zones dial it."""
    return frontend.kind is not FrontendKind.CLUSTER_IP


def pools_of(frontend: ForwardedFrontend) -> set[int]:
    """The places in Port.pools that a frontend sends clients to."""
    six = len(frontend.address) == 16
    return {2 * (action - 1) + six for action in (frontend.inside, frontend.outside) if action <= Action.LOCAL}


def claim_of(port: Port, frontend: ForwardedFrontend) -> tuple[MapSpec, bytes]:
    """The element that only one port can have: that of the map which clients' packets are looked up in."""
    specs = PORT[port.forwarded.key.protocol, frontend.family]
    if frontend.kind is FrontendKind.NODE_PORT:
        return specs.nodeports, frontend.port.to_bytes(2, "big")
    dialled = frontend.address + port_field(frontend.port)
    if frontend.kind is FrontendKind.CLUSTER_IP:
        return specs.frontends, port.tenant.lead + dialled
    return specs.public, dialled


def _value(port: Port, action: Action, family: int) -> bytes:
    """What a frontend map holds. A pool without a target is refused as the resolver would have it refused."""
    cluster, local = port.pools[family == 6], port.pools[2 + (family == 6)]
    pool = cluster if action is Action.CLUSTER else local if action is Action.LOCAL else None
    if pool is not None:
        return number(pool_value(pool.number, len(pool.slots) // WIDTH[family]))
    if action is Action.DROP or (action is Action.LOCAL and cluster is not None):
        return number(DROP)
    return number(REJECT)


def elements(port: Port, node_addresses: frozenset[bytes]) -> Iterator[Element]:
    """A port's own elements, without its pools' and without those that it may share. Not free of duplicates."""
    tenant, forwarded = port.tenant, port.forwarded
    protocol = forwarded.key.protocol
    for position, frontend in enumerate(forwarded.frontends):
        if position in port.blocked:
            continue
        family = frontend.family
        specs = PORT[protocol, family]
        inside = _value(port, frontend.inside, family)
        if frontend.kind is FrontendKind.CLUSTER_IP:
            key = tenant.lead + frontend.address + port_field(frontend.port)
            yield Element(specs.frontends, key, inside)
            continue
        outside = inside if frontend.outside is frontend.inside else _value(port, frontend.outside, family)
        owner = tenant.uid.encode()
        if frontend.kind is FrontendKind.NODE_PORT:
            key = frontend.port.to_bytes(2, "big")
            yield Element(specs.nodeports, key, inside + owner)
            if outside != inside:
                yield Element(specs.nodeports_outside, key, outside)
            if frontend.masquerade is Masquerade.ALWAYS:
                yield Element(specs.nodeports_masquerade, key, b"")
            elif frontend.masquerade is Masquerade.HOST:
                yield Element(specs.nodeports_masquerade_host, key, b"")
            continue
        key = frontend.address + port_field(frontend.port)
        yield Element(specs.public, key, inside + owner)
        if outside != inside:
            yield Element(specs.public_outside, key, outside)
        if frontend.masquerade is Masquerade.ALWAYS:
            yield Element(specs.masquerade, key, b"")
        elif frontend.masquerade is Masquerade.HOST:
            yield Element(specs.masquerade_host, key, b"")
        if frontend.kind is FrontendKind.LOAD_BALANCER and forwarded.source_ranges:
            yield from _firewall(specs, key, frontend.address, forwarded.source_ranges, node_addresses)


def _firewall(
    specs: PortSpecs, key: bytes, address: bytes, ranges: tuple[Prefix, ...], node_addresses: frozenset[bytes]
) -> Iterator[Element]:
    """Who may dial a load balancer's address. Where the node itself may, so may the address: when it is also a local
    address of the node (many load balancers do that), the node's own connections to it come from it. Ranges of the
    other family wall nothing off. (Both are kube-proxy's rules.)"""
    octets = len(address)
    allowed = tuple(prefix for prefix in ranges if len(prefix.address) == octets)
    if not allowed:
        return
    if any(prefix.covers(node) for prefix in allowed for node in node_addresses):
        allowed += (Prefix(address, octets * 8),)
    yield Element(specs.firewalled, key, b"")
    for prefix in merge_prefixes(allowed):
        yield Element(specs.allowed, prefix_range(key, prefix), b"")


def shared(port: Port) -> Iterator[tuple[MapSpec, bytes]]:
    """Elements that a port needs and others of the tenant may need too."""
    zone = port.tenant.lead
    for position, frontend in enumerate(port.forwarded.frontends):
        if frontend.kind is FrontendKind.CLUSTER_IP and position not in port.blocked:
            yield FAMILY[frontend.family].virtual_ips, zone + frontend.address
    for family, own in ((4, port.forwarded.own4), (6, port.forwarded.own6)):
        octets = WIDTH[family] - 2
        for at in range(0, len(own), octets):
            address = own[at : at + octets]
            yield FAMILY[family].hairpin, zone + address + address


def range_elements(tenant: Tenant, prefixes: tuple[Prefix, ...]) -> set[tuple[MapSpec, bytes]]:
    """The elements of virtual_ranges, or super_ranges, for a tenant's ranges."""
    lead = zone_range_field(tenant.zone) if tenant.zone else b""
    found = set()
    for prefix in merge_prefixes(prefixes):
        specs = FAMILY[4 if len(prefix.address) == 4 else 6]
        found.add((specs.virtual_ranges if tenant.zone else specs.super_ranges, prefix_range(lead, prefix)))
    return found


def affine_elements(family: int, pool: Pool) -> Iterator[Element]:
    """What the kernel holds for a pool with affinity besides its endpoints; nothing for others."""
    if not pool.seconds:
        return
    specs, lead = FAMILY[family], number(pool.number)
    yield Element(specs.affine_pools, lead, learn_verdict(family, pool.seconds))
    for target, target_id in pool.ids.items():
        value = affine_value(target_id, pool.number)
        yield Element(specs.affine_targets, value, target_value(target))
        yield Element(specs.affine_ids, lead + target_value(target), value)


def learn_verdict(family: int, seconds: int) -> bytes:
    """The element that makes a pool affine."""
    return f"goto {learn_chain(family, seconds)}".encode()


def first_of_each(found: Iterable[Element]) -> dict[tuple[MapSpec, bytes], bytes]:
    """By map and key. Of equal keys, as an external IP that is also a load balancer's has, the first counts."""
    result: dict[tuple[MapSpec, bytes], bytes] = {}
    for spec, key, value in found:
        result.setdefault((spec, key), value)
    return result
