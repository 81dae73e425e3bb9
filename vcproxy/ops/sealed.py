"""The form of a last good state on disk, of brain and node alike. Bytes in, bytes out; no I/O.

    magic, version (2 octets) | section ...                                                        (integers big-endian)
    section: frames: length (4 octets), MessagePack | 4 zero octets | blake2b-256 of the checksum before and all since

The first section is a content: a header, which is its owner's, and service ports, a thousand a frame, so that neither
encoding nor decoding holds the interpreter for long. Each further section leads from that to a newer content: its
header, and operations. So what a change costs on disk follows the change.

A section counts if it is whole, and leads on from the one that it was written behind. What a run that ended, or a disk
that was full, left half-written at the end is as if it had not been written. The checksums are for torn and rotten
files; that the content is what its header says is for the owner to check.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import ModelMismatch, Operation, TenantModel

VERSION = 2
CHECKSUM_OCTETS = 32
FRAME_PORTS = 1000
_LAST_FRAME = bytes(4)

# As model.tenant.Tenant promises; checked again where it becomes the name of a file.
UID = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")

encode = msgspec.msgpack.Encoder().encode
_ports = msgspec.msgpack.Decoder(list[ServicePort])
_operations = msgspec.msgpack.Decoder(list[Operation])

H = TypeVar("H")


class UnusableState(Exception):
    """The bytes are no state that this version can read or may use; the message says why."""


class End(NamedTuple):
    """How far a file is good: octets, and the checksum there. `first`: octets up to the end of its first section."""

    octets: int
    checksum: bytes
    first: int


class Content(NamedTuple, Generic[H]):
    """What a file says: the newest header, and the model that its sections lead to."""

    header: H
    model: TenantModel
    end: End


class Section:
    """What is to be written, in pieces. Once they are taken, `end` says where the file ends."""

    def __init__(self, frames: Iterable[bytes], *, start: bytes = b"", after: End | None = None) -> None:
        self._frames = frames
        self._start = start
        self._after = after
        self.end: End | None = None

    def __iter__(self) -> Iterator[bytes]:
        octets, first, checksum = 0, 0, hashlib.blake2b(digest_size=CHECKSUM_OCTETS)
        if self._after is not None:
            octets, first = self._after.octets, self._after.first
            checksum.update(self._after.checksum)
        lengthened = (len(frame).to_bytes(4, "big") + frame for frame in self._frames)
        for piece in itertools.chain((self._start,), lengthened, (_LAST_FRAME,)):
            checksum.update(piece)
            octets += len(piece)
            yield piece
        octets += CHECKSUM_OCTETS
        yield checksum.digest()
        self.end = End(octets, checksum.digest(), first or octets)


def seal(magic: bytes, header: msgspec.Struct, ports: Sequence[ServicePort] = ()) -> Section:
    """A whole file."""
    chunks = (ports[start : start + FRAME_PORTS] for start in range(0, len(ports), FRAME_PORTS))
    return Section(map(encode, itertools.chain((header,), chunks)), start=magic + VERSION.to_bytes(2, "big"))


def go_on(after: End, header: msgspec.Struct, operations: Iterable[Operation]) -> Section:
    """What makes a file that ends there one of the content that the operations lead to."""
    return Section(map(encode, (header, list(operations))), after=after)


def unseal(magic: bytes, data: bytes, decode: Callable[[bytes], H]) -> Content[H]:
    """What the file says; `decode`: of a header. Raises UnusableState."""
    at = len(magic) + 2
    if not data.startswith(magic) or len(data) < at:
        raise UnusableState("it is not a state file of vcproxy, or was cut off")
    version = int.from_bytes(data[len(magic) : at], "big")
    if version != VERSION:
        raise UnusableState(f"it has version {version}, this program reads {VERSION}")
    sections = list(_sections(data, at))
    if not sections:
        raise UnusableState("its checksum is wrong: it is damaged")
    (frames, first), *further = sections
    try:
        model = TenantModel(itertools.chain.from_iterable(map(_ports.decode, frames[1:])))
        for changes, _ in further:
            model.apply(itertools.chain.from_iterable(map(_operations.decode, changes[1:])))
        newest, end = sections[-1]
        return Content(decode(newest[0]), model, end._replace(first=first.octets))
    except (msgspec.MsgspecError, ModelMismatch) as error:
        raise UnusableState(f"it does not decode: {error}") from error


def _sections(data: bytes, at: int) -> Iterator[tuple[list[bytes], End]]:
    """The frames of each section up to the first that is not whole, and where it ends. `at`: of the first frame."""
    start, checksum, view = 0, b"", memoryview(data)
    while True:
        frames = []
        while length := int.from_bytes(data[at : at + 4], "big"):
            frames.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        at += 4
        found, good = data[at : at + CHECKSUM_OCTETS], hashlib.blake2b(checksum, digest_size=CHECKSUM_OCTETS)
        good.update(view[start:at])
        if not frames or found != good.digest():
            return
        start = at = at + CHECKSUM_OCTETS
        checksum = found
        yield frames, End(at, checksum, 0)
