"""The form of a last good state on disk, of brain and node alike. Bytes in, bytes out; no I/O.

    magic, version (2 octets) | frames: length (4 octets), MessagePack | blake2b-256 of all before     (big-endian)

The first frame is a header, which is its owner's; the others are service ports, a thousand each, so that neither
encoding nor decoding holds the interpreter for long. The checksum is for a torn or rotten file; that the content is
what its header says is for the owner to check.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence

import msgspec

from vcproxy.model.services import ServicePort

VERSION = 1
CHECKSUM_OCTETS = 32
FRAME_PORTS = 1000

# As model.tenant.Tenant promises; checked again where it becomes the name of a file.
UID = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")

encode = msgspec.msgpack.Encoder().encode
_ports = msgspec.msgpack.Decoder(list[ServicePort])


class UnusableState(Exception):
    """The bytes are no state that this version can read or may use; the message says why."""


def seal(magic: bytes, header: msgspec.Struct, ports: Sequence[ServicePort] = ()) -> Iterator[bytes]:
    """The file, in pieces."""
    chunks = (ports[start : start + FRAME_PORTS] for start in range(0, len(ports), FRAME_PORTS))
    checksum = hashlib.blake2b(digest_size=CHECKSUM_OCTETS)
    frames = itertools.chain((encode(header),), map(encode, chunks))
    lengthened = (len(frame).to_bytes(4, "big") + frame for frame in frames)
    for piece in itertools.chain((magic + VERSION.to_bytes(2, "big"),), lengthened):
        checksum.update(piece)
        yield piece
    yield checksum.digest()


def unseal(magic: bytes, data: bytes) -> tuple[bytes, Iterator[ServicePort]]:
    """The header's bytes, and the service ports: reading those raises MsgspecError. Raises UnusableState."""
    at = len(magic) + 2
    if not data.startswith(magic) or len(data) < at + CHECKSUM_OCTETS:
        raise UnusableState("it is not a state file of vcproxy, or was cut off")
    version = int.from_bytes(data[len(magic) : at], "big")
    if version != VERSION:
        raise UnusableState(f"it has version {version}, this program reads {VERSION}")
    end = len(data) - CHECKSUM_OCTETS
    if hashlib.blake2b(memoryview(data)[:end], digest_size=CHECKSUM_OCTETS).digest() != data[end:]:
        raise UnusableState("its checksum is wrong: it is damaged")
    frames = []
    while at < end:
        length = int.from_bytes(data[at : at + 4], "big")
        frames.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if not frames:
        raise UnusableState("it has no content")
    return frames[0], itertools.chain.from_iterable(map(_ports.decode, frames[1:]))
