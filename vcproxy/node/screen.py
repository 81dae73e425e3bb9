"""Endpoints that no tenant may lead to, by what this node knows itself. Pure.

The brain judges endpoints (its ownership.py), and this node believes it where only the brain can know. What the node
knows as well it checks again, right before tables are resolved, so that neither a fault of the brain nor a table that
was read from the disk makes a tenant's Service lead to

- loopback, link-local (with the clouds' metadata services), multicast or reserved addresses, whoever's Service it is;
- the node itself: packets to its own addresses are delivered here, whatever network the tenant has;
- a pod of another tenant on this node, where the network is flat. A tenant with devices of its own is elsewhere.

What is refused is left out and reported as a rejection of its port. A port of ten endpoints costs two microseconds; of
many ports the endpoints are compared in columns.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from vcproxy.backend.protocol import Rejection
from vcproxy.model.addresses import format_address, never_allowed
from vcproxy.model.endpoints import ENDPOINT4, ENDPOINT6
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import SUPER_UID

IN_COLUMNS = 1024
"""Octets of endpoints from which on columns are faster."""


class Denied(msgspec.Struct, frozen=True):
    """What one tenant may not lead to, besides what nobody may: `nodes` are addresses of this node, `pods` those of its
    pods with their tenants' uids. 4 or 16 octets each.
    """

    nodes: frozenset[bytes] = frozenset()
    pods: Mapping[bytes, str] = {}


class Screened(NamedTuple):
    """Ports without what is denied, in the order given, and what was left out."""

    ports: tuple[ServicePort, ...]
    rejections: tuple[Rejection, ...]


def screen(uid: str, ports: Sequence[ServicePort], denied: Denied) -> Screened:
    """The ports of tenant `uid` as this node may program them."""
    everywhere = Denied() if uid == SUPER_UID else denied
    if sum(len(port.endpoints4) + len(port.endpoints6) for port in ports) < IN_COLUMNS:
        suspects: Sequence[int] = range(len(ports))
    else:
        suspects = _suspects(ports, everywhere)
    screened, rejections = list(ports), []
    for at in suspects:
        left, why = _screen(uid, ports[at], everywhere)
        if why:
            screened[at] = left
            rejections.append(Rejection(left.key, why))
    return Screened(tuple(screened), tuple(rejections))


def refused(uid: str, address: bytes, denied: Denied) -> str:
    """Why an endpoint of tenant `uid` may not be there; "": it may."""
    if never_allowed(address):
        return "is loopback, link-local, multicast or reserved"
    if uid == SUPER_UID:
        return ""
    if address in denied.nodes:
        return "is this node's own"
    if denied.pods.get(address, uid) != uid:
        return "is another tenant's pod"
    return ""


def _screen(uid: str, port: ServicePort, denied: Denied) -> tuple[ServicePort, str]:
    examples: dict[str, tuple[bytes, int]] = {}
    kept: list[bytes] = []
    for packed, octets, size in ((port.endpoints4, 4, ENDPOINT4.itemsize), (port.endpoints6, 16, ENDPOINT6.itemsize)):
        records = [packed[start : start + size] for start in range(0, len(packed), size)]
        good = []
        for record in records:
            why = refused(uid, record[:octets], denied)
            if why:
                first, count = examples.get(why, (record[:octets], 0))
                examples[why] = (first, count + 1)
            else:
                good.append(record)
        kept.append(packed if len(good) == len(records) else b"".join(good))
    if not examples:
        return port, ""
    said = [
        f"endpoint {format_address(first)} {why}" + (f" (and {count - 1} more)" if count > 1 else "")
        for why, (first, count) in sorted(examples.items())
    ]
    return msgspec.structs.replace(port, endpoints4=kept[0], endpoints6=kept[1]), f"left out: {'; '.join(said)}"


def _suspects(ports: Sequence[ServicePort], denied: Denied) -> list[int]:
    """Positions of ports that may have something denied."""
    known = {*denied.nodes, *denied.pods}
    found: set[int] = set()
    for octets, size, packed in (
        (4, ENDPOINT4.itemsize, [port.endpoints4 for port in ports]),
        (16, ENDPOINT6.itemsize, [port.endpoints6 for port in ports]),
    ):
        joined = b"".join(packed)
        if not joined:
            continue
        records = np.frombuffer(joined, np.uint8).reshape(-1, size)
        ends = np.fromiter(map(len, packed), np.int64, len(packed)).cumsum() // size
        head = records[:, 0]
        odd = (head == 0) | (head >= 224) | (head == 127) | (head == 169)
        if wanted := [address for address in known if len(address) == octets]:
            # Padding with zeros, which these strings do in comparisons, is harmless among equal widths.
            addresses = np.ascontiguousarray(records[:, :octets]).view(f"S{octets}").reshape(-1)
            odd |= np.isin(addresses, np.array(wanted, f"S{octets}"))
        found.update(np.unique(ends.searchsorted(odd.nonzero()[0], side="right")).tolist())
    return sorted(found)
