"""The maps and sets of the table as octets: their shapes, and how keys and values are written.

Only this module knows how a field lies in an nftables register. `table` has the same maps as text; the tests load the
one and compare the kernel's lengths with the other.
"""

import sys
from typing import NamedTuple

from vcproxy.model.addresses import Prefix
from vcproxy.model.services import Protocol
from vcproxy_nftables.elements import MapSpec, Ranges
from vcproxy_nftables.pools import NUMBER_BITS

ORDER = sys.byteorder

TENANTS = MapSpec("tenants", 2)
ZONE_BY_INTERFACE = MapSpec("zone_by_interface", 16, 2)
LOCAL_INTERFACES = MapSpec("local_interfaces", 20, ranges=Ranges.CONCATENATED)
MASQUERADE_ALL = MapSpec("masquerade_all", 1)
MASQUERADE_NONLOCAL = MapSpec("masquerade_nonlocal", 1)
NFPROTO = {4: b"\x02", 6: b"\x0a"}


class FamilySpecs(NamedTuple):
    """Maps of one IP family."""

    family: int
    zone_by_address: MapSpec
    endpoints: MapSpec
    balance: MapSpec
    affinity: MapSpec
    affine_pools: MapSpec
    affine_targets: MapSpec
    affine_ids: MapSpec
    virtual_ips: MapSpec
    virtual_ranges: MapSpec
    super_ranges: MapSpec
    local_prefixes: MapSpec
    hairpin: MapSpec
    node_addresses: MapSpec


class PortSpecs(NamedTuple):
    """Maps of one protocol and IP family."""

    frontends: MapSpec
    public: MapSpec
    public_outside: MapSpec
    nodeports: MapSpec
    nodeports_outside: MapSpec
    firewalled: MapSpec
    allowed: MapSpec
    masquerade: MapSpec
    masquerade_host: MapSpec
    nodeports_masquerade: MapSpec
    nodeports_masquerade_host: MapSpec


def _family(f: int) -> FamilySpecs:
    a = 4 if f == 4 else 16
    return FamilySpecs(
        family=f,
        zone_by_address=MapSpec(f"zone_by_address{f}", a, 2),
        endpoints=MapSpec(f"endpoints{f}", 8, a + 4),
        balance=MapSpec(f"balance{f}", 4, verdict=True),
        affinity=MapSpec(f"affinity{f}", 4 + min(a, 12), 4),
        affine_pools=MapSpec(f"affine_pools{f}", 4, verdict=True),
        affine_targets=MapSpec(f"affine_targets{f}", 4, a + 4),
        affine_ids=MapSpec(f"affine_ids{f}", 8 + a, 4),
        virtual_ips=MapSpec(f"virtual_ips{f}", 4 + a),
        virtual_ranges=MapSpec(f"virtual_ranges{f}", 4 + a, ranges=Ranges.CONCATENATED),
        super_ranges=MapSpec(f"super_ranges{f}", a, ranges=Ranges.SINGLE),
        local_prefixes=MapSpec(f"local_prefixes{f}", a, ranges=Ranges.SINGLE),
        hairpin=MapSpec(f"hairpin{f}", 4 + 2 * a),
        node_addresses=MapSpec(f"node_addresses{f}", a),
    )


def _port(protocol: Protocol, f: int) -> PortSpecs:
    a = 4 if f == 4 else 16
    name = f"{protocol.name.lower()}{f}"
    return PortSpecs(
        frontends=MapSpec(f"{name}_frontends", 8 + a, 4),
        public=MapSpec(f"{name}_public_frontends", 4 + a, 4),
        public_outside=MapSpec(f"{name}_public_outside", 4 + a, 4),
        nodeports=MapSpec(f"{name}_nodeports", 2, 4),
        nodeports_outside=MapSpec(f"{name}_nodeports_outside", 2, 4),
        firewalled=MapSpec(f"{name}_firewalled", 4 + a),
        allowed=MapSpec(f"{name}_allowed", 4 + 2 * a, ranges=Ranges.CONCATENATED),
        masquerade=MapSpec(f"{name}_masquerade", 4 + a),
        masquerade_host=MapSpec(f"{name}_masquerade_host", 4 + a),
        nodeports_masquerade=MapSpec(f"{name}_nodeports_masquerade", 2),
        nodeports_masquerade_host=MapSpec(f"{name}_nodeports_masquerade_host", 2),
    )


FAMILY: dict[int, FamilySpecs] = {f: _family(f) for f in (4, 6)}
PORT: dict[tuple[Protocol, int], PortSpecs] = {(p, f): _port(p, f) for p in Protocol for f in (4, 6)}

COMMENTED = frozenset({TENANTS, *(s for ports in PORT.values() for s in (ports.public, ports.nodeports))})
"""Elements whose key has no zone say by a comment, the tenant's uid, whose they are."""

ZONED: tuple[MapSpec, ...] = (
    *(ports.frontends for ports in PORT.values()),
    *(spec for f in FAMILY.values() for spec in (f.virtual_ips, f.virtual_ranges, f.hairpin)),
)
"""Tenants' maps whose key starts with the zone."""

NODE: tuple[MapSpec, ...] = (
    LOCAL_INTERFACES,
    MASQUERADE_ALL,
    MASQUERADE_NONLOCAL,
    *(spec for f in FAMILY.values() for spec in (f.local_prefixes, f.node_addresses)),
)
"""What set_node decides."""

SUPER: tuple[MapSpec, ...] = tuple(f.super_ranges for f in FAMILY.values())
"""The super cluster's own maps, whose key has no zone."""

ATTACHMENT: tuple[MapSpec, ...] = (ZONE_BY_INTERFACE, *(f.zone_by_address for f in FAMILY.values()))
"""What attach decides."""

AFFINE: tuple[MapSpec, ...] = tuple(
    spec for f in FAMILY.values() for spec in (f.affine_pools, f.affine_targets, f.affine_ids)
)
"""Pools' own maps besides endpoints: all know the pool's number."""

PUBLIC: tuple[MapSpec, ...] = tuple(spec for ports in PORT.values() for spec in ports[1:])

WANTED: tuple[MapSpec, ...] = (TENANTS, *NODE, *ATTACHMENT, *ZONED, *SUPER, *PUBLIC, *AFFINE)
"""All that vcproxy writes, but endpoints (packed differently) and affinity (the kernel writes it)."""


def zone_field(zone: int) -> bytes:
    """`ct zone` in a concatenation."""
    return zone.to_bytes(2, ORDER) + b"\0\0"


def zone_range_field(zone: int) -> bytes:
    """`ct zone` in a set of ranges: nft turns it to big endian in set and rule, so that ranges compare as numbers."""
    return zone.to_bytes(2, "big") + b"\0\0"


def zone_of(spec: MapSpec, key: bytes) -> int:
    """The zone that a key of ZONED starts with."""
    return int.from_bytes(key[:2], "big" if spec.ranges else ORDER)


def zone_value(zone: int) -> bytes:
    """`ct zone` alone."""
    return zone.to_bytes(2, ORDER)


def port_field(port: int) -> bytes:
    """`tcp dport` in a concatenation."""
    return port.to_bytes(2, "big") + b"\0\0"


def number(value: int) -> bytes:
    """`meta priority` or `numgen`, alone or in a concatenation."""
    return value.to_bytes(4, ORDER)


def target_value(target: bytes) -> bytes:
    """`ip daddr . tcp dport` from a packed target (address and port)."""
    return target + b"\0\0"


def interface_key(name: str) -> bytes:
    """`iifname`: 15 octets at most (IFNAMSIZ)."""
    return name.encode().ljust(16, b"\0")


def interface_name(key: bytes) -> str:
    """The way back from `interface_key`; octets that are no UTF-8 (only others write such) are replaced."""
    return key.rstrip(b"\0").decode(errors="replace")


def prefix_range(lead: bytes, prefix: Prefix) -> bytes:
    """First and last key, joined, of all addresses of a prefix behind `lead`, which both share."""
    octets = len(prefix.address)
    last = int.from_bytes(prefix.address, "big") | ((1 << (octets * 8 - prefix.length)) - 1)
    return lead + prefix.address + lead + last.to_bytes(octets, "big")


def interface_range(lead: bytes, pattern: str) -> bytes:
    """First and last key, joined, of all device names that a pattern means: one, or with `*` at the end a prefix."""
    if pattern.endswith("*"):
        prefix = pattern[:-1].encode()
        return lead + prefix.ljust(16, b"\0") + lead + prefix.ljust(16, b"\xff")
    return (lead + interface_key(pattern)) * 2


def affine_value(target_id: int, pool: int) -> bytes:
    """What a client is bound to: a target's id within its pool, and the pool's number."""
    return number(target_id << NUMBER_BITS | pool)


def merge_prefixes(prefixes: tuple[Prefix, ...]) -> list[Prefix]:
    """Sorted, without those that another covers: sets of ranges refuse overlaps."""
    kept: list[Prefix] = []
    for prefix in sorted(set(prefixes), key=lambda prefix: (len(prefix.address), prefix.address, prefix.length)):
        if not (kept and kept[-1].length <= prefix.length and kept[-1].covers(prefix.address)):
            kept.append(prefix)
    return kept
