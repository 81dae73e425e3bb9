"""What the table holds, as rows for people, for `diff` and for `explain`: read from the kernel, not from memory.

One row per frontend. `tenant` uid; `kind`: cluster-ip, public or node-port; `protocol`, `family`, `address` (empty for
node ports), `port`; `inside` and `outside`: what happens by client, "balance", "drop" or "reject"; `targets` and
`outside_targets`: texts in slot order; `affinity_seconds`; `masquerade`: "always", "host" or ""; `allowed`: ranges that
a firewall lets in, None without one.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from vcproxy.model.addresses import format_address, format_target
from vcproxy.model.services import Protocol
from vcproxy_nftables.adopt import Image
from vcproxy_nftables.pools import DROP, NUMBER_MASK, NUMBERS, split
from vcproxy_nftables.specs import FAMILY, ORDER, PORT, PortSpecs, number, zone_of
from vcproxy_nftables.state import WIDTH

Row = Mapping[str, Any]


def rows(image: Image, uid: str | None = None) -> Iterator[Row]:
    """The rows of one tenant, or of all."""
    uids = {zone: name for name, zone in image.zones.items()}
    for (protocol, family), specs in PORT.items():
        octets = WIDTH[family] - 2
        for key, value in image.elements[specs.frontends].items():
            tenant = uids.get(zone_of(specs.frontends, key), "")
            if uid in (None, tenant):
                yield _row(image, specs, protocol, family, "cluster-ip", tenant, key[4 : 4 + octets], key[-4:-2], value)
        for key, value in image.elements[specs.public].items():
            if uid in (None, tenant := value[4:].decode()):
                yield _row(image, specs, protocol, family, "public", tenant, key[:octets], key[octets:-2], value)
        for key, value in image.elements[specs.nodeports].items():
            if uid in (None, tenant := value[4:].decode()):
                yield _row(image, specs, protocol, family, "node-port", tenant, b"", key, value)


def _row(
    image: Image,
    specs: PortSpecs,
    protocol: Protocol,
    family: int,
    kind: str,
    tenant: str,
    address: bytes,
    port: bytes,
    value: bytes,
) -> Row:
    held = image.elements
    key = address + port + b"\0\0" if address else port
    outside, masquerade = value, ""
    if kind == "public":
        outside = held[specs.public_outside].get(key, value)
        masquerade = _masquerade(key in held[specs.masquerade], key in held[specs.masquerade_host])
    elif kind == "node-port":
        outside = held[specs.nodeports_outside].get(key, value)
        masquerade = _masquerade(key in held[specs.nodeports_masquerade], key in held[specs.nodeports_masquerade_host])
    inside_action, targets = _decision(image, family, value)
    outside_action, outside_targets = _decision(image, family, outside)
    pool = number(int.from_bytes(value[:4], ORDER) & NUMBER_MASK)
    learns = held[FAMILY[family].affine_pools].get(pool, b"") if targets else b""
    return {
        "tenant": tenant,
        "kind": kind,
        "protocol": protocol.name,
        "family": family,
        "address": format_address(address) if address else "",
        "port": int.from_bytes(port, "big"),
        "inside": inside_action,
        "outside": outside_action,
        "targets": targets,
        "outside_targets": outside_targets,
        "affinity_seconds": int(learns.rpartition(b"_")[2]) if learns else 0,
        "masquerade": masquerade,
        "allowed": _allowed(image, specs, key) if kind == "public" and key in held[specs.firewalled] else None,
    }


def _masquerade(always: bool, host: bool) -> str:
    return "always" if always else "host" if host else ""


def _decision(image: Image, family: int, value: bytes) -> tuple[str, list[str]]:
    target = int.from_bytes(value[:4], ORDER)
    if target < NUMBERS:
        return ("drop" if target == DROP else "reject"), []
    slots = image.pools[family].get(target & NUMBER_MASK, b"")
    return "balance", [
        format_target(packed[:-2], int.from_bytes(packed[-2:], "big")) for packed in split(slots, WIDTH[family])
    ]


def _allowed(image: Image, specs: PortSpecs, key: bytes) -> list[str]:
    width, size = specs.allowed.key_octets, len(key) - 4
    return sorted(
        str(network)
        for found in image.elements[specs.allowed]
        if found.startswith(key)
        for network in ipaddress.summarize_address_range(
            ipaddress.ip_address(found[width - size : width]),
            ipaddress.ip_address(found[2 * width - size :]),
        )
    )
