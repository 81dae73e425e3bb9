"""EndpointSlices in packed form, and the endpoints of a service port joined from them.

What the brain holds of a slice is one record per endpoint (17 or 29 octets, the model's own, with port 0) instead of
decoded objects (560 octets each): a million endpoints fit. Judging, parsing and hashing are paid once, when the slice
arrives. Compiling a service port is then a copy of its slices' records with the port set; only a service with several
slices for one port needs sorting, and numpy does that.

How endpoints are read is kube-proxy's pkg/proxy/endpointslicecache.go: `addresses[0]` only, other families skipped,
ports without name or number skipped, nil conditions as true for ready and serving and false for terminating, hints as
they are (the annotation and trafficDistribution are not the proxy's business).
"""

from collections.abc import Collection, Iterable, Sequence
from struct import Struct
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from vcproxy.brain.guard import Reason, Refusals
from vcproxy.kube import shapes
from vcproxy.model.addresses import AddressError, never_allowed, parse_address
from vcproxy.model.endpoints import (
    ENDPOINT4,
    ENDPOINT6,
    MAX_HINT_SETS,
    READY,
    SERVING,
    TERMINATING,
    Columns,
    Endpoint,
    HintSet,
    columns,
    endpoint_dtype,
    name_id,
    pack,
)
from vcproxy.model.services import Protocol, ServicePort

SERVICE_NAME = "kubernetes.io/service-name"
HEADLESS = "service.kubernetes.io/headless"
LONGEST_NAME = 253

_FAMILIES = {"IPv4": 4, "IPv6": 6}
# Not numpy's tolist(): what it makes of a void type are bytes whose hash is not that of equal bytes.
_ADDRESS = {4: Struct(f"4s{ENDPOINT4.itemsize - 4}x"), 6: Struct(f"16s{ENDPOINT6.itemsize - 16}x")}
_PROTOCOLS = {protocol.name: protocol for protocol in Protocol}


class SlicePort(NamedTuple):
    """A port of a slice: the name and protocol that a service port matches, and the number endpoints listen on."""

    name: str
    protocol: Protocol
    port: int


class PackedSlice(msgspec.Struct, frozen=True, gc=False):
    """One EndpointSlice of `service` (same namespace). `endpoints`: records of `family` with port 0."""

    service: str
    family: int
    ports: tuple[SlicePort, ...]
    endpoints: bytes
    hint_sets: tuple[HintSet, ...]

    @property
    def weight(self) -> int:
        """(address, port) pairs this may compile to."""
        return len(self.endpoints) // endpoint_dtype(self.family).itemsize * len(self.ports)


def addresses_of(packed: bytes, family: int) -> list[bytes]:
    """The address of each packed record."""
    return [address for (address,) in _ADDRESS[family].iter_unpack(packed)]


def without(packed: bytes, family: int, refused: Collection[bytes]) -> bytes:
    """Packed records but those of these addresses."""
    octets, size = (4, ENDPOINT4.itemsize) if family == 4 else (16, ENDPOINT6.itemsize)
    return b"".join(
        packed[at : at + size] for at in range(0, len(packed), size) if packed[at : at + octets] not in refused
    )


class Joined(NamedTuple):
    """The endpoints of one service port: packed records of both families, and the hint sets they index."""

    endpoints4: bytes
    endpoints6: bytes
    hint_sets: tuple[HintSet, ...]


def parse_protocol(text: str | None) -> Protocol | None:
    """A protocol as the API writes it; nothing said is TCP, and what no proxy forwards is None."""
    return Protocol.TCP if not text else _PROTOCOLS.get(text)


def pack_slice(found: shapes.EndpointSlice, refusals: Refusals) -> PackedSlice | None:
    """A slice in packed form; None if it is none of a proxy's business.

    That is: without Service (label kubernetes.io/service-name), of a headless Service (label
    service.kubernetes.io/headless, any value), or of names instead of addresses (FQDN).
    """
    labels = found.metadata.labels
    service = labels.get(SERVICE_NAME, "")
    family = _FAMILIES.get(found.address_type)
    if not 0 < len(service) <= LONGEST_NAME or HEADLESS in labels or family is None:
        return None
    ports = _ports(found.ports or (), refusals)
    endpoints = _endpoints(found.endpoints or (), family, refusals)
    records4, records6, hint_sets = pack(endpoints)
    return PackedSlice(service, family, ports, records4 if family == 4 else records6, hint_sets)


def _ports(ports: Iterable[shapes.EndpointPort], refusals: Refusals) -> tuple[SlicePort, ...]:
    found: set[SlicePort] = set()
    for port in ports:
        if port.name is None or not port.port:
            continue
        protocol = parse_protocol(port.protocol)
        if protocol is None:
            refusals.add("ports[].protocol", Reason.MALFORMED, str(port.protocol), cure="use TCP, UDP or SCTP")
            continue
        found.add(SlicePort(port.name, protocol, port.port))
    return tuple(sorted(found))


def _endpoints(endpoints: Iterable[shapes.Endpoint], family: int, refusals: Refusals) -> list[Endpoint]:
    found: list[Endpoint] = []
    octets = 4 if family == 4 else 16
    for endpoint in endpoints:
        if not endpoint.addresses:
            continue
        text = endpoint.addresses[0]
        try:
            address = parse_address(text)
        except AddressError:
            address = b""
        if len(address) != octets:
            cure = f"write IPv{family} addresses, as the addressType says"
            refusals.add("endpoints[].addresses", Reason.MALFORMED, text, cure=cure)
        elif never_allowed(address):
            refusals.add("endpoints[].addresses", Reason.NEVER_ALLOWED, text)
        else:
            node = name_id(endpoint.node_name) if endpoint.node_name else 0
            found.append(Endpoint(address, 0, _flags(endpoint.conditions), node, _hints(endpoint.hints)))
    return found


def _flags(said: shapes.EndpointConditions) -> int:
    return (
        (READY if said.ready is not False else 0)
        | (SERVING if said.serving is not False else 0)
        | (TERMINATING if said.terminating else 0)
    )


def _hints(said: shapes.EndpointHints | None) -> HintSet | None:
    if said is None or not (said.for_zones or said.for_nodes):
        return None
    return HintSet(
        tuple(sorted({name_id(zone.name) for zone in said.for_zones})),
        tuple(sorted({name_id(node.name) for node in said.for_nodes})),
    )


def join(name: str, protocol: Protocol, slices: Iterable[PackedSlice], families: Sequence[int]) -> Joined:
    """The endpoints of the service port `name`/`protocol`, of those `families`, out of all slices of its Service.

    Equal to `pack` of all the endpoints: canonical, so the order and the cut of the slices do not matter.
    """
    parts = [
        (held, port.port)
        for held in slices
        if held.family in families and held.endpoints
        for port in held.ports
        if port.name == name and port.protocol is protocol
    ]
    union = sorted({hints for held, _ in parts for hints in held.hint_sets})[:MAX_HINT_SETS]
    index = {hints: position + 1 for position, hints in enumerate(union)}
    joined = {4: _merge(parts, 4, index), 6: _merge(parts, 6, index)}
    if union:
        joined, union = _compact(joined, union)
    return Joined(joined[4].tobytes(), joined[6].tobytes(), tuple(union))


def leave_out(port: ServicePort, refused: Collection[bytes]) -> ServicePort:
    """A service port without the endpoints of these addresses: what compiling would give if they had never been."""
    left = {
        family: columns(without(packed, family, refused), family).copy()
        for family, packed in ((4, port.endpoints4), (6, port.endpoints6))
    }
    hint_sets = list(port.hint_sets)
    if hint_sets:
        left, hint_sets = _compact(left, hint_sets)
    return msgspec.structs.replace(
        port, endpoints4=left[4].tobytes(), endpoints6=left[6].tobytes(), hint_sets=tuple(hint_sets)
    )


def _merge(parts: Sequence[tuple[PackedSlice, int]], family: int, index: dict[HintSet, int]) -> Columns:
    tables: list[Columns] = []
    for held, port in parts:
        if held.family != family:
            continue
        table = columns(held.endpoints, family).copy()
        table["port"] = port
        if held.hint_sets:
            numbers = np.array([0, *(index.get(hints, 0) for hints in held.hint_sets)], dtype="<u2")
            table["hints"] = numbers[table["hints"]]
        tables.append(table)
    if not tables:
        return columns(b"", family)
    if len(tables) == 1:
        return tables[0]
    # Bytes, not np.concatenate: that would bring the columns into this machine's byte order.
    return _unique(columns(b"".join(table.tobytes() for table in tables), family), family)


def _unique(table: Columns, family: int) -> Columns:
    """Sorted by (address, port); of duplicates the one that `pack` prefers."""
    octets = 6 if family == 4 else 18
    raw = np.ascontiguousarray(table).view(np.uint8).reshape(len(table), -1)
    # Fixed-width byte strings compare like their octets: padding with zeros is what equal widths make harmless.
    targets: npt.NDArray[np.bytes_] = np.ascontiguousarray(raw[:, :octets]).view(f"S{octets}").reshape(-1)
    flags = table["flags"]
    order = np.lexsort((table["hints"], table["node"], flags & SERVING, flags & READY, ~flags & TERMINATING, targets))
    ranked = targets[order]
    last = np.append(ranked[1:] != ranked[:-1], True)
    kept: Columns = table[order[last]]
    return kept


def _compact(joined: dict[int, Columns], union: list[HintSet]) -> tuple[dict[int, Columns], list[HintSet]]:
    """Without the hint sets that only dropped duplicates had."""
    used = np.unique(np.concatenate([joined[4]["hints"], joined[6]["hints"]]))
    used = used[used > 0]
    if len(used) == len(union):
        return joined, union
    numbers = np.zeros(len(union) + 1, dtype="<u2")
    numbers[used] = np.arange(1, len(used) + 1, dtype="<u2")
    for table in joined.values():
        if len(table):
            table["hints"] = numbers[table["hints"]]
    return joined, [union[position - 1] for position in used.tolist()]
