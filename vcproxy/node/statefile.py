"""What a node writes down: one file a tenant, one for itself, in the form of ops.sealed. Bytes in, bytes out; no I/O.

Besides the checksum two things guard what comes back: the node's name (a disk image that was copied to another node),
and the tenant model's digest (a program that encodes differently today).
"""

from collections.abc import Mapping

import msgspec

from vcproxy.model.mark import UNMARKED, Mark, Position
from vcproxy.model.node import NodeFacts
from vcproxy.model.tenant import Tenant
from vcproxy.ops.sealed import Content, Section, UnusableState, seal, unseal

MAGIC = b"vcproxy-state\n"


class NodeImage(msgspec.Struct, frozen=True):
    """What the brain told of the node; None: nothing yet."""

    facts: NodeFacts | None = None
    placement: Mapping[bytes, str] | None = None
    mark: Mark = UNMARKED


class TenantHeader(msgspec.Struct, frozen=True):
    """What a tenant's file says of the content in it."""

    node: str
    tenant: Tenant
    revision: int
    brain: str
    digest: bytes
    mark: dict[str, Position] = {}


class _NodeHeader(msgspec.Struct, frozen=True):
    node: str
    facts: NodeFacts | None
    placement: list[tuple[bytes, str]] | None
    mark: dict[str, Position] = {}


_tenant_header = msgspec.msgpack.Decoder(TenantHeader)
_node_header = msgspec.msgpack.Decoder(_NodeHeader)


def decode_tenant(data: bytes, *, node: str, uid: str) -> Content[TenantHeader]:
    """What a file says that is named after `uid`. Raises UnusableState."""
    content = unseal(MAGIC, data, _tenant_header.decode)
    header = content.header
    _check_node(header.node, node)
    if header.tenant.uid != uid:
        raise UnusableState(f"it is of tenant {header.tenant.uid[:64]!r}")
    if content.model.digest != header.digest:
        raise UnusableState("its content does not have the digest it claims: another version wrote it")
    return content


def encode_node(image: NodeImage, *, node: str) -> Section:
    """The file of the node."""
    placement = None if image.placement is None else sorted(image.placement.items())
    return seal(MAGIC, _NodeHeader(node, image.facts, placement, dict(image.mark)))


def decode_node(data: bytes, *, node: str) -> NodeImage:
    """The node's file. Raises UnusableState."""
    header = unseal(MAGIC, data, _node_header.decode).header
    _check_node(header.node, node)
    return NodeImage(header.facts, None if header.placement is None else dict(header.placement), header.mark)


def _check_node(found: str, wanted: str) -> None:
    if found != wanted:
        raise UnusableState(f"it is of node {found[:253]!r}, and this is {wanted!r}")
