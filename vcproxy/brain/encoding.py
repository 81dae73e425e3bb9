"""The model as bytes on the stream, made once and shared by every node.

gRPC gets raw bytes, so what a thousand nodes are sent is one object. A protobuf message is a concatenation of fields,
and so are these: the operations of a revision are encoded when it is made, as ready `Delta.operations` fields, and a
delta over several revisions is a header followed by the concatenation of theirs.

A snapshot is a list of parts, each complete in itself. Parts are cut by an upper bound of each port's size, cheap to
compute, so that their number is known before any is encoded; each is encoded when the first stream needs it. So no
step holds the loop for longer than one part takes, and a snapshot that a newer one replaced half-way costs half.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vcproxy.model.mark import UNMARKED, Mark
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import PortKey, ServicePort
from vcproxy.model.tenant import Operation, PatchEndpoints, PutPort, Tenant
from vcproxy.model.timing import Timing
from vcproxy.pb import convert, distribution_pb2, model_pb2

CHUNK_OCTETS = 256 << 10
"""gRPC copies a message for each stream it is written to: 256 KiB keep a thousand slow readers at 256 MiB."""

WORTH_COMPRESSING = 1024

_DELTA_FIELD = distribution_pb2.BrainMessage.DELTA_FIELD_NUMBER
_BATCH_FIELD = distribution_pb2.BrainMessage.BATCH_FIELD_NUMBER
_MESSAGES_FIELD = distribution_pb2.Batch.MESSAGES_FIELD_NUMBER
_OPERATIONS_FIELD = distribution_pb2.Delta.OPERATIONS_FIELD_NUMBER


class Version(NamedTuple):
    """A content of a tenant: what it is (digest), what this brain calls it (revision), and how new it is (mark)."""

    revision: int
    digest: bytes
    mark: Mark = UNMARKED


def port_bound(port: ServicePort) -> int:
    """Octets that the port takes on the wire at most, as an element of ServicePorts.

    Names are ASCII, as convert demands. Every length and number is taken at its longest varint.
    """
    key = port.key
    return (
        64
        + len(key.namespace)
        + len(key.service)
        + len(key.port)
        + 28 * len(port.frontends)
        + 28 * len(port.source_ranges)
        + sum([24 + 8 * (len(hints.zones) + len(hints.nodes)) for hints in port.hint_sets])
        + len(port.endpoints4)
        + len(port.endpoints6)
    )


def operations_bound(operations: Iterable[Operation]) -> int:
    """Octets that the operations take in a delta at most."""
    return sum(map(_operation_bound, operations))


def _operation_bound(operation: Operation) -> int:
    match operation:
        case PutPort(port):
            return 16 + port_bound(port)
        case PatchEndpoints(key, put4, removed4, put6, removed6):
            return 80 + _key_bound(key) + len(put4) + len(removed4) + len(put6) + len(removed6)
    return 48 + _key_bound(operation.key)


def _key_bound(key: PortKey) -> int:
    return len(key.namespace) + len(key.service) + len(key.port)


def encode_operations(operations: Iterable[Operation]) -> bytes:
    """Operations as fields of a Delta, ready to be concatenated."""
    return b"".join([_field(_OPERATIONS_FIELD, convert.encode_operation(o).SerializeToString()) for o in operations])


def decode_operations(uid: str, encoded: Iterable[bytes]) -> Iterator[Operation]:
    """The other way, lazily. Raises MalformedModel: never of its own steps, but by a fault."""
    for step in encoded:
        for operation in distribution_pb2.Delta.FromString(step).operations:
            yield convert.decode_operation(uid, operation)


def encode_delta(
    uid: str, before: Version, after: Version, operations: Sequence[bytes], timing: Timing | None
) -> bytes:
    """A BrainMessage with a Delta; `operations` as encode_operations gives them, of consecutive revisions."""
    header = distribution_pb2.Delta(
        tenant=uid,
        to=after.revision,
        digest=after.digest,
        timing=convert.encode_timing(timing),
        mark=convert.encode_mark(after.mark),
    )
    setattr(header, "from", before.revision)
    body = header.SerializeToString()
    length = len(body) + sum(map(len, operations))
    return b"".join((_prelude(_DELTA_FIELD, length), body, *operations))


def encode_batch(messages: Sequence[bytes]) -> bytes:
    """One BrainMessage of several."""
    return _field(_BATCH_FIELD, b"".join([_field(_MESSAGES_FIELD, message) for message in messages]))


def encode_together(messages: Sequence[bytes]) -> bytes:
    """Some BrainMessages as one; one alone as it is."""
    return messages[0] if len(messages) == 1 else encode_batch(messages)


def _field(number: int, body: bytes) -> bytes:
    return _prelude(number, len(body)) + body


def _prelude(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field (protobuf encoding, wire type 2)."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


class Snapshot:
    """One content of a tenant in parts of at most CHUNK_OCTETS (a single larger port is a part of its own).

    An empty tenant is one empty part. Immutable to its users: a stream may read on in it while the tenant changes.
    """

    def __init__(self, uid: str, version: Version, ports: Iterable[ServicePort]) -> None:
        self.uid = uid
        self.version = version
        self._cut: list[tuple[ServicePort, ...] | None] = list(_cut(ports))
        self._encoded: list[bytes | None] = [None] * len(self._cut)

    def __len__(self) -> int:
        return len(self._cut)

    def part(self, index: int) -> bytes:
        """A BrainMessage with part `index` of 0..len-1."""
        encoded = self._encoded[index]
        if encoded is None:
            encoded = self._encoded[index] = self._encode(index)
            self._cut[index] = None  # the model has moved on: do not hold what it dropped
        return encoded

    def _encode(self, index: int) -> bytes:
        ports = self._cut[index]
        assert ports is not None
        plain = model_pb2.ServicePorts(ports=[convert.encode_port(port) for port in ports]).SerializeToString()
        body, encoding = plain, distribution_pb2.PLAIN
        if len(plain) >= WORTH_COMPRESSING:
            # Level 1: ten times smaller at 15 ms for 6 MB; level 6 takes four times as long for a tenth less.
            packed = zlib.compress(plain, 1)
            if len(packed) < len(plain) * 3 // 4:
                body, encoding = packed, distribution_pb2.ZLIB
        return distribution_pb2.BrainMessage(
            snapshot=distribution_pb2.Snapshot(
                tenant=self.uid,
                revision=self.version.revision,
                digest=self.version.digest,
                part=index,
                parts=len(self),
                encoding=encoding,
                ports=body,
                mark=convert.encode_mark(self.version.mark),
            )
        ).SerializeToString()


def _cut(ports: Iterable[ServicePort]) -> Iterator[tuple[ServicePort, ...]]:
    room = CHUNK_OCTETS - 1024  # for the header
    part: list[ServicePort] = []
    held = 0
    for port in ports:
        size = port_bound(port)
        if part and held + size > room:
            yield tuple(part)
            part, held = [], 0
        part.append(port)
        held += size
    yield tuple(part)


def encode_welcome(brain: str, version: str, features: Iterable[str] = ()) -> bytes:
    """The first message of a stream."""
    return distribution_pb2.BrainMessage(
        welcome=distribution_pb2.Welcome(brain=brain, version=version, features=features)
    ).SerializeToString()


def encode_added(tenant: Tenant, mark: Mark = UNMARKED, *, asks: bool = False) -> bytes:
    """Precedes everything about a tenant; `mark`: where the brain is with it; `asks`: the node is to say the same."""
    message = convert.encode_tenant(tenant, mark)
    message.asks = asks
    return distribution_pb2.BrainMessage(added=message).SerializeToString()


def encode_synced(uid: str, version: Version) -> bytes:
    """The node has all of the tenant."""
    return distribution_pb2.BrainMessage(
        synced=distribution_pb2.Synced(
            tenant=uid,
            revision=version.revision,
            digest=version.digest,
            mark=convert.encode_mark(version.mark),
        )
    ).SerializeToString()


def encode_behind(uid: str, reason: str) -> bytes:
    """What the brain has of the tenant may be older than what the node holds; "": no longer."""
    return distribution_pb2.BrainMessage(
        behind=distribution_pb2.TenantBehind(tenant=uid, reason=reason)
    ).SerializeToString()


def encode_stale(uid: str, since: float | None, reason: str) -> bytes:
    """`since` in Unix seconds; None: well again."""
    nanoseconds = max(1, int(since * 1e9)) if since is not None else 0
    return distribution_pb2.BrainMessage(
        stale=distribution_pb2.TenantStale(tenant=uid, since=nanoseconds, reason=reason)
    ).SerializeToString()


def encode_node_behind(reason: str) -> bytes:
    """What the brain knows of the super cluster may be older than what the node was told; "": no longer."""
    return distribution_pb2.BrainMessage(node_behind=distribution_pb2.NodeBehind(reason=reason)).SerializeToString()


def encode_removed(uid: str, mark: Mark = UNMARKED) -> bytes:
    """The tenant is gone, or no longer placed on the node. `mark`, here and below: of what the brain knows of that."""
    return distribution_pb2.BrainMessage(
        removed=distribution_pb2.TenantRemoved(tenant=uid, mark=convert.encode_mark(mark))
    ).SerializeToString()


def encode_released(uid: str) -> bytes:
    """This brain feeds the tenant no longer."""
    return distribution_pb2.BrainMessage(released=distribution_pb2.TenantReleased(tenant=uid)).SerializeToString()


def encode_complete(uids: Iterable[str], mark: Mark = UNMARKED) -> bytes:
    """Every tenant of the node."""
    return distribution_pb2.BrainMessage(
        complete=distribution_pb2.TenantsComplete(tenants=sorted(uids), mark=convert.encode_mark(mark))
    ).SerializeToString()


def encode_placement(
    put: Iterable[tuple[bytes, str]], removed: Iterable[bytes], mark: Mark = UNMARKED, *, complete: bool
) -> bytes:
    """Pods of the node: address and tenant uid."""
    return distribution_pb2.BrainMessage(
        placement=distribution_pb2.Placement(
            complete=complete,
            put=[distribution_pb2.PlacedPod(address=address, tenant=uid) for address, uid in put],
            removed=removed,
            mark=convert.encode_mark(mark),
        )
    ).SerializeToString()


def encode_facts(facts: NodeFacts, mark: Mark = UNMARKED) -> bytes:
    """Facts of the node."""
    message = convert.encode_facts(facts)
    message.mark.extend(convert.encode_mark(mark))
    return distribution_pb2.BrainMessage(facts=message).SerializeToString()
