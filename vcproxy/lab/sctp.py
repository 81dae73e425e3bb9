"""As much of SCTP (RFC 9260) as tells who answers: INIT, INIT ACK and ABORT, as octets for raw sockets.

Kernels without SCTP sockets still translate SCTP (nf_conntrack_proto_sctp.c, nf_nat_proto.c), so a lab speaks it
itself. The answer to an INIT carries a state cookie, whose content is the server's own business: here it is the line
that the lab's TCP and UDP servers send. Stdlib only: the server process uses it too.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

PROTOCOL = 132  # <linux/in.h>
INIT, INIT_ACK, ABORT = 1, 2, 6
_COOKIE = 7
_HEADER = struct.Struct("!HHI")
_INIT = struct.Struct("!IIHHI")  # initiate tag, window, streams out and in, first TSN


class Packet(NamedTuple):
    """One packet with one chunk. tag: the verification tag, 0 in an INIT; initiate: the tag that its sender wants to
    see, in INIT and INIT ACK; cookie: in INIT ACK.
    """

    source: int
    destination: int
    tag: int
    chunk: int
    initiate: int = 0
    cookie: bytes = b""

    def octets(self) -> bytes:
        body = b""
        if self.chunk != ABORT:
            body = _INIT.pack(self.initiate, 65536, 1, 1, 1)
        if self.chunk == INIT_ACK:
            body += struct.pack("!HH", _COOKIE, 4 + len(self.cookie)) + _padded(self.cookie)
        chunk = struct.pack("!BBH", self.chunk, 0, 4 + len(body)) + body
        header = _HEADER.pack(self.source, self.destination, self.tag)
        return header + struct.pack("<I", crc32c(header + bytes(4) + chunk)) + chunk


def parse(octets: bytes) -> Packet | None:
    """Read a packet; None if it is none of these, is cut short, or has a wrong checksum: receivers drop such ones."""
    if len(octets) < 16:
        return None
    source, destination, tag = _HEADER.unpack_from(octets)
    (checksum,) = struct.unpack_from("<I", octets, 8)
    if crc32c(octets[:8] + bytes(4) + octets[12:]) != checksum:
        return None
    chunk = octets[12]
    if chunk == ABORT:
        return Packet(source, destination, tag, chunk)
    if chunk not in (INIT, INIT_ACK) or len(octets) < 32:
        return None
    initiate = _INIT.unpack_from(octets, 16)[0]
    cookie = b""
    if chunk == INIT_ACK:
        kind, length = struct.unpack_from("!HH", octets, 32) if len(octets) >= 36 else (0, 0)
        if kind != _COOKIE:
            return None
        cookie = octets[36 : 32 + length]
    return Packet(source, destination, tag, chunk, initiate, cookie)


def payload(octets: bytes) -> bytes:
    """What is behind the IPv4 header, which raw IPv4 sockets deliver (raw(7))."""
    return octets[4 * (octets[0] & 15) :]


def crc32c(octets: bytes) -> int:
    """The checksum of RFC 9260, appendix A: CRC32c, reflected."""
    value = 0xFFFFFFFF
    for octet in octets:
        value = (value >> 8) ^ _TABLE[(value ^ octet) & 255]
    return value ^ 0xFFFFFFFF


def _padded(octets: bytes) -> bytes:
    return octets + bytes(-len(octets) % 4)


def _entry(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


_TABLE = [_entry(number) for number in range(256)]
