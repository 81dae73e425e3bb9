"""The node's devices and addresses, followed live through rtnetlink.

A subscription and a listing, in that order, so that nothing falls between them; after an overrun (ENOBUFS) the listing
is made anew. The parser is a plain function over datagrams. Only messages of the family "unspecified" tell of links: a
DELLINK of family AF_BRIDGE means that a port left its bridge, and the device is still there (net/bridge/br_netlink.c).
"""

import asyncio
import errno
import socket
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vcproxy.ops import logs

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
_ERROR, _DONE = 2, 3
_REQUEST, _DUMP, _DUMP_INTERRUPTED = 0x1, 0x300, 0x10
_IFLA_IFNAME, _IFLA_EXT_MASK, _SKIP_STATS = 3, 29, 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR

_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")

DATAGRAM = 1 << 16
RECEIVE_BUFFER = 1 << 20
LISTING_TIMEOUT = 5.0
LISTING_ATTEMPTS = 5
RELIST_AFTER_ERROR = 1.0

log = logs.get("links")

Seen = Callable[[frozenset[str], frozenset[bytes]], None]


class Message(NamedTuple):
    """One netlink message without its header."""

    type: int
    flags: int
    body: bytes


class Links:
    """What the kernel has, as far as messages told: devices by index, and (index, address) of each."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._addresses: set[tuple[int, bytes]] = set()

    @property
    def names(self) -> frozenset[str]:
        """Names of all devices."""
        return frozenset(self._names.values())

    @property
    def addresses(self) -> frozenset[bytes]:
        """All addresses, 4 or 16 octets each."""
        return frozenset(address for _, address in self._addresses)

    def note(self, message: Message) -> None:
        """Take in a message; what is not about links or addresses is ignored."""
        match message.type:
            case 16 | 17:  # NEWLINK, DELLINK
                family, _, index, _, _ = _IFINFO.unpack_from(message.body)
                if family != socket.AF_UNSPEC:
                    return
                if message.type == DELLINK:
                    self._names.pop(index, None)
                    self._addresses = {(at, address) for at, address in self._addresses if at != index}
                elif name := _attributes(message.body, _IFINFO.size).get(_IFLA_IFNAME):
                    self._names[index] = name.rstrip(b"\0").decode(errors="surrogateescape")
            case 20 | 21:  # NEWADDR, DELADDR
                _, _, _, _, index = _IFADDR.unpack_from(message.body)
                attributes = _attributes(message.body, _IFADDR.size)
                # On a point-to-point device ADDRESS is the peer's and LOCAL is ours.
                address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
                if address is None:
                    return
                if message.type == NEWADDR:
                    self._addresses.add((index, address))
                else:
                    self._addresses.discard((index, address))


def messages(datagram: bytes) -> Iterator[Message]:
    """The netlink messages of a datagram."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, flags, _, _ = _HEADER.unpack_from(datagram, at)
        if length < _HEADER.size:
            return
        yield Message(kind, flags, datagram[at + _HEADER.size : at + length])
        at += (length + 3) & ~3


def _attributes(body: bytes, at: int) -> dict[int, bytes]:
    found = {}
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = body[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def listing() -> Links:
    """What the kernel has now, in the network namespace of the calling thread. Raises OSError."""
    for _ in range(LISTING_ATTEMPTS):
        links, whole = Links(), True
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
            route.settimeout(LISTING_TIMEOUT)
            skip = _ATTRIBUTE.pack(8, _IFLA_EXT_MASK) + struct.pack("=I", _SKIP_STATS)
            for kind, body in ((GETLINK, _IFINFO.pack(0, 0, 0, 0, 0) + skip), (GETADDR, _IFADDR.pack(0, 0, 0, 0, 0))):
                route.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, 1, 0) + body)
                whole &= _read_listing(route, links)
        if whole:
            break
    return links


def _read_listing(route: socket.socket, links: Links) -> bool:
    """Read one listing; False if the kernel says that something changed meanwhile, so that it may have holes."""
    whole = True
    while True:
        for message in messages(route.recv(DATAGRAM)):
            whole &= not message.flags & _DUMP_INTERRUPTED
            if message.type == _DONE:
                return whole
            if message.type == _ERROR:
                code = -int.from_bytes(message.body[:4], "little", signed=True)
                raise OSError(code, f"listing links: {errno.errorcode.get(code, code)}")
            links.note(message)


def _discard(monitor: socket.socket) -> None:
    """Read until nothing is queued, overruns included."""
    while True:
        try:
            monitor.recv(DATAGRAM)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                return


class LinkMonitor:
    """Tells `seen` (all device names, all addresses) at once and after each change, while its context is open.

    `seen` is called on the event loop, once for any number of changes that arrived together, and only if something
    that it gets differs.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._links = Links()
        self._told: tuple[frozenset[str], frozenset[bytes]] | None = None
        self._socket: socket.socket | None = None
        self._later: asyncio.TimerHandle | None = None

    def __enter__(self) -> "LinkMonitor":
        monitor = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            monitor.setblocking(False)
            monitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            monitor.bind((0, _GROUPS))
            self._links = listing()
        except BaseException:
            monitor.close()
            raise
        self._socket = monitor
        self._tell()
        asyncio.get_running_loop().add_reader(monitor, self._readable, monitor)
        return self

    def __exit__(self, *_: object) -> None:
        if self._later is not None:
            self._later.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _readable(self, monitor: socket.socket) -> None:
        try:
            while True:
                for message in messages(monitor.recv(DATAGRAM)):
                    self._links.note(message)
        except BlockingIOError:
            self._tell()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                log.warning("following links failed; listing them anew", error=str(error))
            # What is queued is from before the loss: noted after the listing, it would bring back devices whose
            # deletion was lost. What arrives from now on is whole.
            _discard(monitor)
            self._relist()

    def _relist(self) -> None:
        self._later = None
        try:
            self._links = listing()
        except OSError as error:
            log.error("links cannot be listed; retrying", error=str(error))
            self._later = asyncio.get_running_loop().call_later(RELIST_AFTER_ERROR, self._relist)
        else:
            self._tell()

    def _tell(self) -> None:
        now = (self._links.names, self._links.addresses)
        if now != self._told:
            self._told = now
            self._seen(*now)
