"""Every element that anybody adds to or deletes from a node's table, told by the kernel itself.

The kernel announces each change of the ruleset to a multicast group (NFNLGRP_NFTABLES, nf_tables_setelem_notify), in
order, to every listener in the same network namespace. A table made and removed by hand marks where a test looks up:
what was committed before it was told before it.
"""

from __future__ import annotations

import ipaddress
import itertools
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from vcproxy.lab import Node, netns

_NETLINK_NETFILTER, _SOL_NETLINK, _ADD_MEMBERSHIP = 12, 270, 1
_SO_RCVBUFFORCE = 33
_GROUP = 7  # NFNLGRP_NFTABLES
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_NEWTABLE, _NEWELEM, _DELELEM, _NEWGEN = 0, 12, 14, 15
_TABLE_NAME, _SET, _ELEMENTS, _KEY, _DATA, _VALUE = 1, 2, 3, 1, 2, 1
_TABLE = "vcproxy"
_MARKS = itertools.count()


class Element(NamedTuple):
    """One element's change. `key` and `data` are the registers' octets."""

    added: bool
    map: str
    key: bytes
    data: bytes


@dataclass(frozen=True)
class Concern:
    """What an element is about, as far as its key says: `zone`, `address`, `port` (dialled) or `pool` (family,
    number)."""

    zone: int | None = None
    address: str | None = None
    port: int | None = None
    pool: tuple[int, int] | None = None


def concern(element: Element) -> Concern:
    """Read an element's key. Raises ValueError for a map that Services do not concern."""
    name, key = element.map, element.key
    width = 16 if "6" in name else 4
    if name.startswith("endpoints"):
        return Concern(pool=(6 if width == 16 else 4, int.from_bytes(key[:4], sys.byteorder)))
    if name.endswith("_frontends") and "public" not in name:
        return Concern(_zone(key), _address(key[4 : 4 + width]), int.from_bytes(key[4 + width : 6 + width], "big"))
    if name.startswith(("virtual_ips", "hairpin")):
        return Concern(_zone(key), _address(key[4 : 4 + width]))
    if "nodeports" in name:
        return Concern(port=int.from_bytes(key[:2], "big"))
    raise ValueError(f"an element of {name}: {key.hex()}")


def _zone(key: bytes) -> int:
    return int.from_bytes(key[:2], sys.byteorder)


def _address(octets: bytes) -> str:
    return str(ipaddress.ip_address(octets))


class Watcher:
    """Hears what changes in a node's table while the context is open. Not thread-safe."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.others: list[str] = []
        """Messages about the table that are no elements: chains, rules, sets."""
        self._elements: list[Element] = []
        self._marked = ""
        with netns.entered(node.ns):
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)

    def __enter__(self) -> Self:
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        self._socket.setblocking(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def heard(self) -> list[Element]:
        """All elements that changed since the last call (or the start), complete up to now."""
        mark = f"mark{next(_MARKS)}"
        self._node.run(["nft", f"add table inet {mark}; delete table inet {mark}"])
        deadline = time.monotonic() + 5
        while self._marked != mark:
            if not select.select([self._socket], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the kernel did not tell of table {mark} on node {self._node.name}")
            self._receive()
        heard, self._elements = self._elements, []
        return heard

    def _receive(self) -> None:
        data = self._socket.recv(1 << 18)  # OSError ENOBUFS: something was missed, and the test knows nothing
        at = 0
        while at + 16 <= len(data):
            length, kind = struct.unpack_from("=IH", data, at)
            if kind >> 8 == _SUBSYSTEM and kind & 255 != _NEWGEN:
                self._take(kind & 255, dict(_attributes(data, at + 20, at + length)))
            at += length + 3 & ~3

    def _take(self, kind: int, said: dict[int, bytes]) -> None:
        table = said[_TABLE_NAME].rstrip(b"\0").decode()
        if table != _TABLE:
            if kind == _NEWTABLE and table.startswith("mark"):
                self._marked = table
            return
        if kind not in (_NEWELEM, _DELELEM):
            self.others.append(f"message {kind} {said}")
            return
        name = said[_SET].rstrip(b"\0").decode()
        for _, element in _attributes(said[_ELEMENTS]):
            parts = dict(_attributes(element))
            key, value = (dict(_attributes(parts.get(part, b""))).get(_VALUE, b"") for part in (_KEY, _DATA))
            self._elements.append(Element(kind == _NEWELEM, name, key, value))


def _attributes(data: bytes, at: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Type and payload of netlink attributes in a row."""
    end = len(data) if end is None else end
    while at + 4 <= end:
        length, kind = struct.unpack_from("=HH", data, at)
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += length + 3 & ~3
