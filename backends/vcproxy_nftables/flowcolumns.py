"""Conntrack's flows as columns: which of very many are stale, without building one object for each.

A Service's address may have a hundred thousand UDP flows (a cluster's DNS has), of which a handful go to an endpoint
that has left. The kernel tells each flow as a message of nested attributes, all of the same layout for flows of one
kind. So one message of a layout is parsed, its attribute headers become a mask, and all messages of the same length
whose masked octets are equal are cut into columns at once: the way of `dumps`, for ctnetlink_fill_info
(net/netfilter/nf_conntrack_netlink.c). What has another layout (a zone more, a mark) is the next group.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vcproxy_nftables.elements import Matrix
from vcproxy_nftables.wire import ATTRIBUTE, Reply, attributes

Target: TypeAlias = tuple[bytes, int]
"""An address of 4 or 16 octets, and a port."""

# <linux/netfilter/nfnetlink_conntrack.h>: CTA_*, CTA_TUPLE_*, CTA_IP_* (by octets of the address), CTA_PROTO_*.
TUPLE_ORIG, TUPLE_REPLY, ID, ZONE = 1, 2, 12, 18
TUPLE_IP, TUPLE_PROTO, TUPLE_ZONE = 1, 2, 3
SOURCE, DESTINATION = {4: 1, 16: 3}, {4: 2, 16: 4}
PROTO_NUM, PROTO_SRC_PORT, PROTO_DST_PORT = 1, 2, 3

_Path: TypeAlias = tuple[int, ...]
Packed: TypeAlias = npt.NDArray[np.bytes_]
_NESTS: frozenset[_Path] = frozenset(
    (side, *inner) for side in (TUPLE_ORIG, TUPLE_REPLY) for inner in ((), (TUPLE_IP,), (TUPLE_PROTO,))
)


class _Group(NamedTuple):
    """Flows of one layout: their `rows` among the replies; u1[n, size]; `places` of attributes by their path."""

    rows: npt.NDArray[np.intp]
    octets: Matrix
    places: Mapping[_Path, tuple[int, int]]

    def column(self, *path: int) -> Matrix | None:
        place = self.places.get(path)
        return None if place is None else self.octets[:, place[0] : place[1]]

    def numbers(self, *path: int) -> npt.NDArray[np.int64]:
        """A big-endian number of each flow; 0 where the layout has none."""
        column = self.column(*path)
        if column is None:
            return np.zeros(len(self.octets), np.int64)
        weights = 1 << 8 * np.arange(column.shape[1] - 1, -1, -1, dtype=np.int64)
        return column.astype(np.int64) @ weights

    def targets(self, side: int, ends: Mapping[int, int], port: int) -> Packed | None:
        """Address and port of each flow as one value of 6 or 18 octets; None if the layout has no such tuple."""
        ports = self.column(side, TUPLE_PROTO, port)
        for end in ends.values():
            addresses = self.column(side, TUPLE_IP, end)
            if addresses is not None and ports is not None:
                return _packed(np.concatenate((addresses, ports), axis=1))
        return None


def _packed(octets: Matrix) -> Packed:
    """Each row of u1[n, width] as one value. (Byte strings, which numpy can sort: of one width they compare alike.)"""
    return np.ascontiguousarray(octets).view(f"S{octets.shape[1]}").reshape(-1)


def _places(message: bytes) -> tuple[npt.NDArray[np.bool_], dict[_Path, tuple[int, int]]]:
    """Parse one message: the mask of its attribute headers, and where which attribute is."""
    mask = np.zeros(len(message), np.bool_)
    places: dict[_Path, tuple[int, int]] = {}

    def walk(path: _Path, start: int, end: int) -> None:
        for kind, first, last in attributes(message, start, end):
            mask[first - ATTRIBUTE.size : first] = True
            if (*path, kind) in _NESTS:
                walk((*path, kind), first, last)
            else:
                places[(*path, kind)] = (first, last)

    walk((), 0, len(message))
    return mask, places


def _groups(replies: Sequence[Reply]) -> Iterator[_Group]:
    by_length: dict[int, list[int]] = {}
    for row, reply in enumerate(replies):
        by_length.setdefault(reply.end - reply.start, []).append(row)
    for length, members in by_length.items():
        joined = b"".join([replies[row].data[replies[row].start : replies[row].end] for row in members])
        octets: Matrix = np.frombuffer(joined, np.uint8).reshape(-1, length)
        rows = np.array(members)
        while len(rows):
            mask, places = _places(octets[0].tobytes())
            same = (octets[:, mask] == octets[0, mask]).all(axis=1)
            yield _Group(rows[same], octets[same], places)
            rows, octets = rows[~same], octets[~same]


def stale_rows(
    replies: Sequence[Reply], zones: Collection[int], protocol: int, serving: Mapping[Target, Set[Target]]
) -> list[int]:
    """The places among `replies` (IPCTNL_MSG_CT_NEW each) of flows in these zones (of the original direction) and of
    this protocol that were dialled to a key of `serving` and are answered by none of its targets.
    """
    found: list[int] = []
    wanted = np.fromiter(zones, np.int64, len(zones))
    for group in _groups(replies):
        dialled = group.targets(TUPLE_ORIG, DESTINATION, PROTO_DST_PORT)
        answering = group.targets(TUPLE_REPLY, SOURCE, PROTO_SRC_PORT)
        if dialled is None or answering is None:
            continue
        zone = group.numbers(ZONE) if (ZONE,) in group.places else group.numbers(TUPLE_ORIG, TUPLE_ZONE)
        mine = np.isin(zone, wanted) & (group.numbers(TUPLE_ORIG, TUPLE_PROTO, PROTO_NUM) == protocol)
        order = np.argsort(dialled[mine], kind="stable")
        at = mine.nonzero()[0][order]
        if not len(at):
            continue
        dialled = dialled[at]
        starts = np.flatnonzero(np.append(True, dialled[1:] != dialled[:-1]))
        for start, end in zip(starts, (*starts[1:], len(at)), strict=True):
            destination = _target(dialled[start : start + 1].tobytes())
            if destination in serving:
                kept = [address + port.to_bytes(2, "big") for address, port in serving[destination]]
                some = at[start:end]
                known = np.frombuffer(b"".join(kept), dialled.dtype) if kept else dialled[:0]
                found.extend(group.rows[some[~np.isin(answering[some], known)]].tolist())
    return found


def _target(octets: bytes) -> Target:
    return octets[:-2], int.from_bytes(octets[-2:], "big")
