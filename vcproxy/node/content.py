"""A tenant's content as it arrives: checked, and all of it or nothing.

A delta is applied in place and taken back if it does not fit; a snapshot is collected beside what is held.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.message import DecodeError

from vcproxy.model.services import PortKey, ServicePort
from vcproxy.model.tenant import ModelMismatch, Operation, PatchEndpoints, PutPort, TenantModel
from vcproxy.node.holdings import Extent
from vcproxy.pb import convert, distribution_pb2, model_pb2
from vcproxy.pb.convert import MalformedModel

LARGEST_PART = 64 << 20
"""Octets that a compressed part may become: a hundred times what a brain makes."""


class Arriving:
    """A snapshot of which some parts are there."""

    def __init__(self, message: distribution_pb2.Snapshot) -> None:
        self.revision = message.revision
        self.digest = message.digest
        self.parts = message.parts
        self.mark = convert.decode_mark(message.tenant, message.mark)
        self.next = 0
        self.spent = 0  # nanoseconds
        self.model = TenantModel()

    def expects(self, message: distribution_pb2.Snapshot) -> bool:
        """Whether this is its next part."""
        return (message.revision, message.digest, message.parts, message.part) == (
            self.revision,
            self.digest,
            self.parts,
            self.next,
        )


Before = Mapping[PortKey, ServicePort | None]
"""What the service ports that a change touched were before it."""


def apply(uid: str, model: TenantModel, operations: Sequence[Operation], *, digest: bytes) -> Before:
    """Apply a delta to the model; returns what it touched, as that was before.

    Raises ModelMismatch or MalformedModel when the result is not what it should be; the model is then as it was.
    """
    before = {key: model.get(key) for key in map(_key, operations)}
    try:
        model.apply(operations)
        for operation in operations:
            if isinstance(operation, PatchEndpoints) and (port := model.get(operation.key)) is not None:
                convert.check_endpoints(uid, port)
        if model.digest != digest:
            raise ModelMismatch("after the delta the content has another digest than announced")
    except (ModelMismatch, MalformedModel):
        for key, port in before.items():
            if port is None:
                model.remove(key)
            else:
                model.put(port)
        raise
    return before


def extent(before: Before, model: TenantModel) -> Extent:
    """How many Services differ in the model from what they were."""
    services, endpoints = set(), set()
    for key, old in before.items():
        new, name = model.get(key), (key.namespace, key.service)
        if old is None or new is None or not old.same_but_endpoints(new):
            services.add(name)
        if (old.endpoints4 + old.endpoints6 if old else b"") != (new.endpoints4 + new.endpoints6 if new else b""):
            endpoints.add(name)
    return Extent(len(services), len(endpoints))


def _key(operation: Operation) -> PortKey:
    return operation.port.key if isinstance(operation, PutPort) else operation.key


def ports_of(uid: str, message: distribution_pb2.Snapshot) -> Iterable[ServicePort]:
    """The service ports of one part. Raises MalformedModel."""
    body = message.ports
    if message.encoding == distribution_pb2.ZLIB:
        inflater = zlib.decompressobj()
        try:
            body = inflater.decompress(body, LARGEST_PART)
        except zlib.error as error:
            raise MalformedModel(uid, None, f"part {message.part} of a snapshot cannot be inflated: {error}") from None
        if not inflater.eof:
            raise MalformedModel(uid, None, f"part {message.part} of a snapshot is cut, or larger than {LARGEST_PART}")
    elif message.encoding != distribution_pb2.PLAIN:
        raise MalformedModel(uid, None, f"part {message.part} of a snapshot has unknown encoding {message.encoding}")
    try:
        ports = model_pb2.ServicePorts.FromString(body).ports
    except DecodeError:
        raise MalformedModel(uid, None, f"part {message.part} of a snapshot is not a ServicePorts message") from None
    return [convert.decode_port(uid, port) for port in ports]
