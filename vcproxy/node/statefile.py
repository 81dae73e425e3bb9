"""The form of the last good state on disk: one file a tenant, one for the node. Bytes in, bytes out; no I/O.

    magic, version (2 octets) | frames: length (4 octets), MessagePack | blake2b-256 of all before     (big-endian)

The first frame is a header, the others are ports, a thousand each, so that neither encoding nor decoding holds the
interpreter for long. Three checks guard what comes back: the checksum (a torn or rotten file), the node's name (a disk
image that was copied to another node), and the tenant model's digest (a program that encodes differently today).
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from vcproxy.model.mark import UNMARKED, Mark, Position
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Tenant, TenantModel

MAGIC = b"vcproxy-state\n"
VERSION = 1
CHECKSUM_OCTETS = 32
FRAME_PORTS = 1000

# As model.tenant.Tenant promises; checked again where it becomes the name of a file.
UID = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")

_encode = msgspec.msgpack.Encoder().encode


class UnusableState(Exception):
    """The bytes are no state of this node that this version can read; the message says why."""


class TenantImage(msgspec.Struct, frozen=True):
    """One tenant at one moment: what is written and what is read back."""

    tenant: Tenant
    ports: tuple[ServicePort, ...]
    revision: int
    brain: str
    digest: bytes
    mark: Mark = UNMARKED


class NodeImage(msgspec.Struct, frozen=True):
    """What the brain told of the node; None: nothing yet."""

    facts: NodeFacts | None = None
    placement: Mapping[bytes, str] | None = None


class _TenantHeader(msgspec.Struct, frozen=True):
    node: str
    tenant: Tenant
    revision: int
    brain: str
    digest: bytes
    mark: dict[str, Position] = {}  # not there in files of versions that had none


class _NodeHeader(msgspec.Struct, frozen=True):
    node: str
    facts: NodeFacts | None
    placement: list[tuple[bytes, str]] | None


_tenant_header = msgspec.msgpack.Decoder(_TenantHeader)
_node_header = msgspec.msgpack.Decoder(_NodeHeader)
_ports = msgspec.msgpack.Decoder(list[ServicePort])


def encode_tenant(image: TenantImage, *, node: str) -> Iterator[bytes]:
    """The file of a tenant, in pieces."""
    header = _TenantHeader(node, image.tenant, image.revision, image.brain, image.digest, dict(image.mark))
    starts = range(0, len(image.ports), FRAME_PORTS)
    chunks = (image.ports[start : start + FRAME_PORTS] for start in starts)
    return _sealed(itertools.chain((_encode(header),), map(_encode, chunks)))


def decode_tenant(data: bytes, *, node: str, uid: str) -> tuple[Tenant, TenantModel, int, str, Mark]:
    """(tenant, model, revision, brain, mark) of a file that is named after `uid`. Raises UnusableState."""
    first, *rest = _unsealed(data)
    try:
        header = _tenant_header.decode(first)
        _check_node(header.node, node)
        if header.tenant.uid != uid:
            raise UnusableState(f"it is of tenant {header.tenant.uid[:64]!r}")
        model = TenantModel(itertools.chain.from_iterable(map(_ports.decode, rest)))
    except msgspec.MsgspecError as error:
        raise UnusableState(f"it does not decode: {error}") from error
    if model.digest != header.digest:
        raise UnusableState("its content does not have the digest it claims: another version wrote it")
    return header.tenant, model, header.revision, header.brain, header.mark


def encode_node(image: NodeImage, *, node: str) -> Iterator[bytes]:
    """The file of the node, in pieces."""
    placement = None if image.placement is None else sorted(image.placement.items())
    return _sealed((_encode(_NodeHeader(node, image.facts, placement)),))


def decode_node(data: bytes, *, node: str) -> NodeImage:
    """The node's file. Raises UnusableState."""
    first, *_ = _unsealed(data)
    try:
        header = _node_header.decode(first)
    except msgspec.MsgspecError as error:
        raise UnusableState(f"it does not decode: {error}") from error
    _check_node(header.node, node)
    return NodeImage(header.facts, None if header.placement is None else dict(header.placement))


def _check_node(found: str, wanted: str) -> None:
    if found != wanted:
        raise UnusableState(f"it is of node {found[:253]!r}, and this is {wanted!r}")


def _sealed(frames: Iterable[bytes]) -> Iterator[bytes]:
    checksum = hashlib.blake2b(digest_size=CHECKSUM_OCTETS)
    lengthened = (len(frame).to_bytes(4, "big") + frame for frame in frames)
    for piece in itertools.chain((MAGIC + VERSION.to_bytes(2, "big"),), lengthened):
        checksum.update(piece)
        yield piece
    yield checksum.digest()


def _unsealed(data: bytes) -> list[bytes]:
    """The frames, at least one."""
    at = len(MAGIC) + 2
    if not data.startswith(MAGIC) or len(data) < at + CHECKSUM_OCTETS:
        raise UnusableState("it is not a state file of vcproxy, or was cut off")
    version = int.from_bytes(data[len(MAGIC) : at], "big")
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
    return frames
