"""Endpoints in packed columns, so that a million of them are cheap to hold, send, compare and resolve.

The endpoints of one service port and one IP family are one `bytes` object: fixed-size records, sorted by (address,
port), without duplicates. The same bytes are the memory of the brain, the wire and the memory of the node; numpy reads
them in place. 17 bytes an IPv4 endpoint, 29 an IPv6 one.

Names of nodes and zones are 64-bit hashes (`name_id`), not indexes of a string table: an index depends on history, so
it would make equal states differ in bytes and digests, and every replica of the brain would need the other's table. A
node only ever asks "is it me, is it my zone". Two names of one tenant that collide (2^-64 a pair) would mislead only
that tenant.

Hints are an index into the service port's own `hint_sets`, 0 standing for no hint: an endpoint may carry several
(KEP-2433, KEP-3015), but a service port has few distinct ones.
"""

import functools
import hashlib
import itertools
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

READY = 1
SERVING = 2
TERMINATING = 4

_COLUMNS = [("port", ">u2"), ("hints", "<u2"), ("flags", "u1"), ("node", "<u8")]
ENDPOINT4 = np.dtype([("address", "V4"), *_COLUMNS])
ENDPOINT6 = np.dtype([("address", "V16"), *_COLUMNS])
TARGET4 = np.dtype([("address", "V4"), ("port", ">u2")])
TARGET6 = np.dtype([("address", "V16"), ("port", ">u2")])

NO_NODE = 0
MAX_HINT_SETS = 0xFFFF

Columns = npt.NDArray[np.void]


class HintSet(NamedTuple):
    """Where an endpoint asks to be used from: ids of zones and of nodes, each sorted. Never both empty."""

    zones: tuple[int, ...]
    nodes: tuple[int, ...]


class Endpoint(NamedTuple):
    """One endpoint as read from a slice, before packing. `address` has 4 or 16 octets; `hints` is None or a HintSet."""

    address: bytes
    port: int
    flags: int
    node: int = NO_NODE
    hints: HintSet | None = None


@functools.lru_cache(maxsize=65536)
def name_id(name: str) -> int:
    """The 64-bit id of a node or zone name; 0 (NO_NODE) only for the empty name."""
    if not name:
        return NO_NODE
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1


def endpoint_dtype(record_family: int) -> np.dtype[np.void]:
    """The record dtype of IP family 4 or 6."""
    return ENDPOINT4 if record_family == 4 else ENDPOINT6


def target_dtype(record_family: int) -> np.dtype[np.void]:
    """The (address, port) dtype of IP family 4 or 6: the leading bytes of an endpoint record."""
    return TARGET4 if record_family == 4 else TARGET6


def columns(packed: bytes, record_family: int) -> Columns:
    """A read-only structured view of packed endpoints, shape (n,). Raises ValueError if the length is no multiple."""
    return np.frombuffer(packed, endpoint_dtype(record_family))


def pack(endpoints: Iterable[Endpoint]) -> tuple[bytes, bytes, tuple[HintSet, ...]]:
    """Endpoints of one service port to (IPv4 records, IPv6 records, hint sets).

    The result is canonical: equal sets of endpoints give equal bytes.

    Duplicates become one record: the same endpoint in several slices while it is moved, or two pods, when a network
    uses the address of a pod again that still terminates. Then the living one counts (kube-proxy's addEndpoints). So
    the best flags win: not terminating, then ready, then serving; then the greatest node id and the greatest hints, so
    that the result does not depend on order.
    """
    best: dict[bytes, Endpoint] = {}
    hinted = False
    for endpoint in endpoints:
        target = endpoint.address + endpoint.port.to_bytes(2, "big")
        hinted = hinted or endpoint.hints is not None
        held = best.get(target)
        if held is None or _preference(endpoint) > _preference(held):
            best[target] = endpoint
    hint_sets: tuple[HintSet, ...] = ()
    if hinted:
        distinct = {endpoint.hints for endpoint in best.values() if endpoint.hints is not None}
        hint_sets = tuple(sorted(distinct))[:MAX_HINT_SETS]
    index = {hints: position + 1 for position, hints in enumerate(hint_sets)}
    records: tuple[list[bytes], list[bytes]] = ([], [])
    for target in sorted(best):  # octets compare as addresses and ports do, within a family
        address, _, flags, node, hints = best[target]
        hint = index.get(hints, 0) if hints is not None else 0
        records[len(address) == 16].append(target + _rest(hint, flags, node))
    return b"".join(records[0]), b"".join(records[1]), hint_sets


_rest = struct.Struct("<HBQ").pack
"""What follows the target in a record: hints, flags, node."""


def _preference(endpoint: Endpoint) -> tuple[bool, bool, bool, int, HintSet]:
    flags = endpoint.flags
    hints = endpoint.hints or HintSet((), ())
    return not flags & TERMINATING, bool(flags & READY), bool(flags & SERVING), endpoint.node, hints


def unpack(packed: bytes, record_family: int, hint_sets: tuple[HintSet, ...] = ()) -> list[Endpoint]:
    """Packed records back to Endpoints: for people and for tests, not for the hot path."""
    rows = columns(packed, record_family)
    return [
        Endpoint(
            bytes(row["address"]),
            int(row["port"]),
            int(row["flags"]),
            int(row["node"]),
            hint_sets[row["hints"] - 1] if row["hints"] else None,
        )
        for row in rows
    ]


def diff(old: bytes, new: bytes, record_family: int) -> tuple[bytes, bytes]:
    """(records to put, targets to remove) that turn `old` into `new`; a changed record is only in the first."""
    size, key = endpoint_dtype(record_family).itemsize, target_dtype(record_family).itemsize
    before = {old[at : at + size] for at in range(0, len(old), size)}
    after = [new[at : at + size] for at in range(0, len(new), size)]
    put = [record for record in after if record not in before]
    kept = {record[:key] for record in after}
    removed = sorted(record[:key] for record in before if record[:key] not in kept)
    return b"".join(put), b"".join(removed)


def patch(old: bytes, put: bytes, removed: bytes, record_family: int) -> bytes:
    """Apply what `diff` gave. Removing an absent target or putting an equal record is no error."""
    size, key = endpoint_dtype(record_family).itemsize, target_dtype(record_family).itemsize
    records = {old[at : at + key]: old[at : at + size] for at in range(0, len(old), size)}
    for at in range(0, len(removed), key):
        records.pop(removed[at : at + key], None)
    for at in range(0, len(put), size):
        records[put[at : at + key]] = put[at : at + size]
    return b"".join(records[target] for target in sorted(records))


def is_canonical(packed: bytes, record_family: int) -> bool:
    """True if `packed` is whole records, sorted by target, without duplicates. A node checks what it is sent."""
    size, key = endpoint_dtype(record_family).itemsize, target_dtype(record_family).itemsize
    if len(packed) % size:
        return False
    targets = [packed[at : at + key] for at in range(0, len(packed), size)]
    return all(a < b for a, b in itertools.pairwise(targets))
