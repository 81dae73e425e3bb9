"""What the API servers want, what the kernel has, and how the two compare: the end-to-end tests' oracle.

Both sides are computed here without a line of vcproxy. `wanted` reads Services and EndpointSlices as kube-proxy's
documentation tells them; `Kernel.read` asks `nft` for the table and follows it as a packet would: what was dialled ->
pool -> slots. So a mistake that brain, node and backend share cannot hide.
"""

from __future__ import annotations

import ipaddress
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from e2e.objects import Object
from vcproxy.lab import Node

SUPER = "super"
ANY_NODE = {4: "any-node-4", 6: "any-node-6"}
"""The address of a NodePort: any of the node's."""

_PROTOCOLS = ("tcp", "udp", "sctp")
_FAMILIES = (4, 6)
_SPECIAL = {1: "drop", 2: "reject"}

Target = tuple[str, int]


class Frontend(NamedTuple):
    """What a client dials."""

    protocol: str
    address: str
    port: int


Answer = frozenset[Target] | str
"""The endpoints that a client may get, or "drop" or "reject"."""
Forwarding = Mapping[Frontend, Answer]
Pool = tuple[int, int]
"""Family and number."""


def wanted(services: Iterable[Object], slices: Iterable[Object], *, node: str, public: bool) -> dict[Frontend, Answer]:
    """What a node must forward for one tenant, by its API objects. `public`: NodePorts too, which tenants are not
    granted by default. Knows no topology hints, external IPs and load balancers: tests that use those judge them
    themselves.
    """
    endpoints: dict[tuple[str, str, int], list[tuple[Object, Object]]] = defaultdict(list)
    for found in slices:
        owner = found["metadata"].get("labels", {}).get("kubernetes.io/service-name")
        family = {"IPv4": 4, "IPv6": 6}.get(found["addressType"])
        if owner and family:
            key = (found["metadata"]["namespace"], owner, family)
            endpoints[key] += [(item, port) for item in found["endpoints"] or () for port in found.get("ports") or ()]
    forwarding: dict[Frontend, Answer] = {}
    for service in services:
        metadata, spec = service["metadata"], service["spec"]
        if spec["type"] == "ExternalName" or spec.get("clusterIP") in (None, "", "None"):
            continue
        for port in spec["ports"]:
            for address in map(ipaddress.ip_address, spec["clusterIPs"]):
                family = address.version
                rows = [
                    (item, said["port"])
                    for item, said in endpoints[metadata["namespace"], metadata["name"], family]
                    if (said.get("name") or "", said["protocol"]) == (port.get("name") or "", port["protocol"])
                    and said.get("port")
                ]
                usable = _usable(rows)
                local = _usable((item, number) for item, number in rows if item.get("nodeName") == node)
                inside = _answer(usable, local, policy=spec.get("internalTrafficPolicy", "Cluster"))
                forwarding[Frontend(port["protocol"], str(address), port["port"])] = inside
                if public and port.get("nodePort"):
                    forwarding[Frontend(port["protocol"], ANY_NODE[family], port["nodePort"])] = usable or "reject"
    return forwarding


def _usable(rows: Iterable[tuple[Object, int]]) -> frozenset[Target]:
    """Ready endpoints; if there are none, those that still serve while they terminate. Of one that is there twice the
    living one counts, then the ready one.
    """
    best: dict[Target, tuple[bool, bool, bool]] = {}
    for item, number in rows:
        conditions = item.get("conditions", {})
        ready = conditions.get("ready") is not False
        serving, terminating = conditions.get("serving", ready), conditions.get("terminating", False)
        target = (str(ipaddress.ip_address(item["addresses"][0])), number)
        best[target] = max(best.get(target, (False, False, False)), (not terminating, ready, serving))
    able = frozenset(target for target, (_, ready, _) in best.items() if ready)
    return able or frozenset(target for target, (living, _, serving) in best.items() if serving and not living)


def _answer(usable: frozenset[Target], local: frozenset[Target], *, policy: str) -> Answer:
    if policy == "Local":
        return local or ("drop" if usable else "reject")
    return usable or "reject"


@dataclass(frozen=True)
class Kernel:
    """The table of one node. By tenant uid: `zones`, `forwarding` and `pools` (which pool a frontend leads to);
    `attached`: interfaces and addresses of each tenant. `faults`: what must never be, in words.
    """

    zones: Mapping[str, int]
    forwarding: Mapping[str, Forwarding]
    pools: Mapping[str, Mapping[Frontend, Pool]]
    attached: Mapping[str, frozenset[str]]
    faults: tuple[str, ...]

    @classmethod
    def read(cls, node: Node) -> Kernel:
        """Read a node's table."""
        done = node.run(["nft", "-j", "list", "table", "inet", "vcproxy"], check=False)
        if done.returncode:
            return cls({}, {}, {}, {}, ("there is no table",))
        elements = {}
        for entry in json.loads(done.stdout)["nftables"]:
            for kind in ("map", "set"):
                if kind in entry:
                    elements[entry[kind]["name"]] = entry[kind].get("elem", [])
        return _Reader(elements).kernel()


class _Reader:
    def __init__(self, elements: Mapping[str, list[Any]]) -> None:
        self._elements = elements
        self._uids = {0: SUPER}
        self._slots: dict[Pool, dict[int, Target]] = defaultdict(dict)
        self._owners: dict[Pool, str] = {}
        self._forwarding: dict[str, dict[Frontend, Answer]] = defaultdict(dict)
        self._pools: dict[str, dict[Frontend, Pool]] = defaultdict(dict)
        self._faults: list[str] = []

    def kernel(self) -> Kernel:
        for element in self._elements.get("tenants", ()):
            self._uids[_fields(element)[0]] = element["elem"]["comment"]
        for family in _FAMILIES:
            self._read_family(family)
        self._faults += [
            f"pool {pool} is nobody's: {slots}" for pool, slots in self._slots.items() if pool not in self._owners
        ]
        attached: dict[str, set[str]] = defaultdict(set)
        for name in ("zone_by_interface", "zone_by_address4", "zone_by_address6"):
            for (place,), (zone,) in self._pairs(name):
                attached[self._uids.get(zone, f"zone {zone} of nobody")].add(place)
        return Kernel(
            {uid: zone for zone, uid in self._uids.items()},
            dict(self._forwarding),
            dict(self._pools),
            {uid: frozenset(places) for uid, places in attached.items()},
            tuple(self._faults),
        )

    def _read_family(self, family: int) -> None:
        for (pool, slot), (address, port) in self._pairs(f"endpoints{family}"):
            self._slots[family, _number(pool)][slot] = (address, port)
        for protocol in _PROTOCOLS:
            name = protocol.upper()
            for (zone, address, port), (value,) in self._pairs(f"{protocol}{family}_frontends"):
                self._point(self._uids.get(zone), Frontend(name, address, port), family, value)
            for (port,), (value,), uid in self._owned(f"{protocol}{family}_nodeports"):
                self._point(uid, Frontend(name, ANY_NODE[family], port), family, value)
            for (address, port), (value,), uid in self._owned(f"{protocol}{family}_public_frontends"):
                self._point(uid, Frontend(name, address, port), family, value)

    def _point(self, uid: str | None, frontend: Frontend, family: int, value: str) -> None:
        """A frontend's value: size class in the upper 12 bits, number in the lower 20."""
        if uid is None:
            self._faults.append(f"{frontend} belongs to no tenant")
            return
        number, size = _number(value) & 0xFFFFF, _number(value) >> 20
        if not size:
            self._forwarding[uid][frontend] = _SPECIAL[number]
            return
        pool = (family, number)
        slots = self._slots[pool]
        if sorted(slots) != list(range(size)) or len(set(slots.values())) != size:
            self._faults.append(f"{uid} {frontend}: pool {pool} of {size} slots holds {slots}")
        if self._owners.setdefault(pool, uid) != uid:
            self._faults.append(f"pool {pool} is shared by {uid} and {self._owners[pool]}")
        self._forwarding[uid][frontend] = frozenset(slots.values())
        self._pools[uid][frontend] = pool

    def _pairs(self, name: str) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        for key, value in self._elements.get(name, ()):
            yield _fields(key), _fields(value)

    def _owned(self, name: str) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], str]]:
        """Keys without a zone, whose owner is in their comment."""
        for key, value in self._elements.get(name, ()):
            yield _fields(key), _fields(value), key["elem"]["comment"]


def _fields(element: Any) -> tuple[Any, ...]:
    """The fields of a key or value as `nft -j` has them: plain, concatenated, or with a comment around."""
    if isinstance(element, dict) and "elem" in element:
        element = element["elem"]["val"]
    return tuple(element["concat"]) if isinstance(element, dict) else (element,)


def _number(priority: str) -> int:
    """`meta priority` as nft writes it (a traffic class handle, tc(8)): "none" or "MAJOR:MINOR" in hex."""
    if priority == "none":
        return 0
    major, _, minor = priority.partition(":")
    return int(major or "0", 16) << 16 | int(minor or "0", 16)


def differences(want: Forwarding, have: Forwarding) -> list[str]:
    """What differs, in words; empty if nothing does."""
    return [
        f"{frontend}: want {_text(want.get(frontend))}, have {_text(have.get(frontend))}"
        for frontend in sorted(want.keys() | have.keys())
        if want.get(frontend) != have.get(frontend)
    ]


def _text(answer: Answer | None) -> str:
    return "nothing" if answer is None else answer if isinstance(answer, str) else str(sorted(answer))
