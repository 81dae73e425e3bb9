"""What a node writes down: one file a tenant, one for itself, in the form of ops.sealed. Bytes in, bytes out; no I/O.

Besides the checksum two things guard what comes back: the node's name (a disk image that was copied to another node),
and the tenant model's digest (a program that encodes differently today).
"""

from collections.abc import Iterator, Mapping

import msgspec

from vcproxy.model.mark import UNMARKED, Mark, Position
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.ops.sealed import UnusableState, seal, unseal

MAGIC = b"vcproxy-state\n"


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


def encode_tenant(image: TenantImage, *, node: str) -> Iterator[bytes]:
    """The file of a tenant, in pieces."""
    header = _TenantHeader(node, image.tenant, image.revision, image.brain, image.digest, dict(image.mark))
    return seal(MAGIC, header, image.ports)


def decode_tenant(data: bytes, *, node: str, uid: str) -> tuple[Tenant, TenantModel, int, str, Mark]:
    """(tenant, model, revision, brain, mark) of a file that is named after `uid`. Raises UnusableState."""
    first, ports = unseal(MAGIC, data)
    try:
        header = _tenant_header.decode(first)
        _check_node(header.node, node)
        if header.tenant.uid != uid:
            raise UnusableState(f"it is of tenant {header.tenant.uid[:64]!r}")
        model = TenantModel(ports)
    except msgspec.MsgspecError as error:
        raise UnusableState(f"it does not decode: {error}") from error
    if model.digest != header.digest:
        raise UnusableState("its content does not have the digest it claims: another version wrote it")
    return header.tenant, model, header.revision, header.brain, header.mark


def encode_node(image: NodeImage, *, node: str) -> Iterator[bytes]:
    """The file of the node, in pieces."""
    placement = None if image.placement is None else sorted(image.placement.items())
    return seal(MAGIC, _NodeHeader(node, image.facts, placement))


def decode_node(data: bytes, *, node: str) -> NodeImage:
    """The node's file. Raises UnusableState."""
    first, _ = unseal(MAGIC, data)
    try:
        header = _node_header.decode(first)
    except msgspec.MsgspecError as error:
        raise UnusableState(f"it does not decode: {error}") from error
    _check_node(header.node, node)
    return NodeImage(header.facts, None if header.placement is None else dict(header.placement))


def _check_node(found: str, wanted: str) -> None:
    if found != wanted:
        raise UnusableState(f"it is of node {found[:253]!r}, and this is {wanted!r}")
