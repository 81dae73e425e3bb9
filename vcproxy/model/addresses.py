"""Addresses as network-order bytes: 4 octets are IPv4, 16 are IPv6.

Bytes, because that is what the wire, the digest and the kernel all want; `ipaddress` objects cost 30 times the memory
and are made only where people read. Kubernetes still accepts legacy IPv4 with leading zeros ("172.030.0.041") and
reads them as decimal (k8s.io/utils/net ParseIPSloppy), so parsing does the same: the kernel must never see the octal
reading of the same string.
"""

import ipaddress
import socket
from collections.abc import Iterable
from typing import NamedTuple


class AddressError(ValueError):
    """The text is not an IP address or prefix."""


class Prefix(NamedTuple):
    """A CIDR: `address` has 4 or 16 octets with all host bits zero, `length` is 0..32 or 0..128."""

    address: bytes
    length: int

    def covers(self, address: bytes) -> bool:
        """True if `address` (4 or 16 octets) is of this family and inside."""
        if len(address) != len(self.address):
            return False
        shift = len(address) * 8 - self.length
        return int.from_bytes(address, "big") >> shift == int.from_bytes(self.address, "big") >> shift

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self.length}"


def _decimal_octets(text: str) -> str:
    if "." not in text or ":" in text:
        return text
    return ".".join(
        octet.lstrip("0") or "0" if octet.isascii() and octet.isdigit() else octet for octet in text.split(".")
    )


def parse_address(text: str) -> bytes:
    """Text to 4 or 16 octets; surrounding space and leading zeros are accepted, IPv4-mapped IPv6 becomes IPv4.

    Raises AddressError. Zones ("fe80::1%eth0") are refused: a Service never has one.
    """
    try:
        return socket.inet_pton(socket.AF_INET, text)  # nearly all are this, and it takes no leading zero
    except (OSError, ValueError):
        cleaned = _decimal_octets(text.strip())
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            packed = socket.inet_pton(family, cleaned)
        except (OSError, ValueError):
            continue
        return packed[12:] if packed[:12] == _MAPPED else packed
    raise AddressError(f"{text[:64]!r} is not an IP address")


_MAPPED = bytes(10) + b"\xff\xff"


def readable_addresses(texts: Iterable[str]) -> list[bytes]:
    """Those of the texts that are addresses, as `parse_address` has them: where the others mean nothing."""
    found: list[bytes] = []
    for text in texts:
        try:
            found.append(parse_address(text))
        except AddressError:
            continue
    return found


def is_address(text: str) -> bool:
    """Whether `parse_address` takes it."""
    return bool(readable_addresses((text,)))


def parse_prefix(text: str) -> Prefix:
    """CIDR text to Prefix; host bits are cleared as kube-proxy does. A bare address is its own /32 or /128.

    Raises AddressError.
    """
    address_text, slash, length_text = text.strip().partition("/")
    address = parse_address(address_text)
    bits = len(address) * 8
    if slash:
        if not (length_text.isascii() and length_text.isdigit() and int(length_text) <= bits):
            raise AddressError(f"{text[:64]!r} is not a CIDR: the length must be 0..{bits}")
        length = int(length_text)
    else:
        length = bits
    shift = bits - length
    return Prefix((int.from_bytes(address, "big") >> shift << shift).to_bytes(bits // 8, "big"), length)


def format_address(address: bytes) -> str:
    """4 or 16 octets to canonical text (RFC 5952 for IPv6)."""
    return str(ipaddress.ip_address(address))


def format_target(address: bytes, port: int) -> str:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    text = format_address(address)
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"


def covered(address: bytes, ranges: Iterable[Prefix]) -> bool:
    """Whether an address lies in one of the ranges."""
    return any(prefix.covers(address) for prefix in ranges)


NEVER = tuple(
    parse_prefix(text)
    for text in (
        "0.0.0.0/8",  # "this network", RFC 1122
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local and the metadata services
        "224.0.0.0/4",
        "240.0.0.0/4",  # reserved, and limited broadcast
        "::/96",  # unspecified, loopback and the deprecated IPv4-compatible ones
        "fe80::/10",
        "ff00::/8",
    )
)
# Most addresses are told by their first octet alone; endpoints come by the million.
_SUSPECT4 = frozenset(octet for octet in range(256) if octet in (0, 127, 169) or octet >= 224)
_SUSPECT6 = frozenset((0x00, 0xFE, 0xFF))


def never_allowed(address: bytes) -> bool:
    """Whether an address (4 or 16 octets) may be neither VIP nor endpoint, for anybody."""
    if address[0] not in (_SUSPECT4 if len(address) == 4 else _SUSPECT6):
        return False
    return covered(address, NEVER)
