"""A tenant's compiled model: service ports, revision-free content, a digest, and deltas between contents.

The digest is the sum modulo 2^256 of a hash per service port (an incremental multiset hash, Bellare and Micciancio's
AdHash): adding, changing or removing one service port costs one or two hashes whatever the total, the order of events
does not matter, and any two brains that compiled the same objects agree. A tenant that finds a collision deceives
nobody but its own nodes' copy of its own services.

`Operation`s are what a delta is made of. Applying a model's diff gives, byte for byte, the other model.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from vcproxy.model import endpoints
from vcproxy.model.addresses import Prefix
from vcproxy.model.services import PortKey, ServicePort

SUPER_UID = "super"
DIGEST_OCTETS = 32
EMPTY_DIGEST = bytes(DIGEST_OCTETS)
_MODULUS = 1 << (8 * DIGEST_OCTETS)

_encode = msgspec.msgpack.Encoder().encode


class Tenant(msgspec.Struct, frozen=True):
    """Who a tenant is. `uid` is immutable and matches [a-z0-9][a-z0-9.-]{0,62}; `name` is for people and may be reused.

    `virtual_ranges`: the ranges its ClusterIPs come from; an address inside that no Service holds is dropped.
    """

    uid: str
    name: str
    virtual_ranges: tuple[Prefix, ...] = ()


class PutPort(msgspec.Struct, frozen=True, tag=True):
    """The service port is now this."""

    port: ServicePort


class RemovePort(msgspec.Struct, frozen=True, tag=True):
    """The service port is gone. Removing an unknown one is no error."""

    key: PortKey


class PatchEndpoints(msgspec.Struct, frozen=True, tag=True):
    """Only endpoints changed: records to put and targets to remove, per family, as model.endpoints.diff gives them."""

    key: PortKey
    put4: bytes = b""
    removed4: bytes = b""
    put6: bytes = b""
    removed6: bytes = b""


Operation = PutPort | RemovePort | PatchEndpoints


class ModelMismatch(Exception):
    """A delta does not fit the model it was applied to: ask for a snapshot."""


def port_hash(port: ServicePort) -> int:
    """256-bit hash of a service port's canonical form: blake2b of its MessagePack array encoding.

    `health_check_node_port` was not always there: where it is 0 the array ends before it, so that versions which do and
    do not know it agree on all ports that do without.
    """
    form = _encode(port)
    if not port.health_check_node_port:
        form = bytes((form[0] - 1,)) + form[1:-1]
    return int.from_bytes(hashlib.blake2b(form, digest_size=DIGEST_OCTETS).digest(), "big")


class TenantModel:
    """The service ports of one tenant, with their digest kept up to date at each change. Not thread-safe."""

    def __init__(self, ports: Iterable[ServicePort] = ()) -> None:
        self._ports: dict[PortKey, ServicePort] = {}
        self._sum = 0
        self._digest: bytes | None = EMPTY_DIGEST  # None: to be made
        for port in ports:
            self.put(port)

    def __len__(self) -> int:
        return len(self._ports)

    def __iter__(self) -> Iterator[ServicePort]:
        return iter(self._ports.values())

    def get(self, key: PortKey) -> ServicePort | None:
        """The service port, or None."""
        return self._ports.get(key)

    @property
    def ports(self) -> Mapping[PortKey, ServicePort]:
        """A live read-only view."""
        return self._ports

    @property
    def digest(self) -> bytes:
        """32 octets; equal for equal contents, on any brain and any node. All zeros when empty."""
        if self._digest is None:
            self._digest = self._sum.to_bytes(DIGEST_OCTETS, "big")
        return self._digest

    def put(self, port: ServicePort) -> Operation | None:
        """Set a service port. Returns the smallest operation that tells the change, None if nothing changed."""
        old = self._ports.get(port.key)
        if old == port:
            return None
        self._sum = (self._sum + port_hash(port) - (port_hash(old) if old else 0)) % _MODULUS
        self._digest = None
        self._ports[port.key] = port
        return difference(old, port)

    def remove(self, key: PortKey) -> Operation | None:
        """Remove a service port. Returns the operation, None if it was not there."""
        old = self._ports.pop(key, None)
        if old is None:
            return None
        self._sum = (self._sum - port_hash(old)) % _MODULUS
        self._digest = None
        return RemovePort(key)

    def apply(self, operations: Iterable[Operation]) -> set[PortKey]:
        """Apply a delta; returns the keys it touched. Raises ModelMismatch when a patch names an unknown service port.

        On ModelMismatch the model is left part-way: discard it and take a snapshot.
        """
        touched: set[PortKey] = set()
        for operation in operations:
            match operation:
                case PutPort(port):
                    self.put(port)
                    touched.add(port.key)
                case RemovePort(key):
                    self.remove(key)
                    touched.add(key)
                case PatchEndpoints(key):
                    old = self._ports.get(key)
                    if old is None:
                        raise ModelMismatch(f"a patch of endpoints names {key}, which is not in the model")
                    self.put(patched(old, operation))
                    touched.add(key)
        return touched

    def diff(self, new: "TenantModel") -> list[Operation]:
        """Operations that turn this model into `new`."""
        operations: list[Operation] = [RemovePort(key) for key in self._ports if key not in new._ports]
        for key, port in new._ports.items():
            old = self._ports.get(key)
            if old != port:
                operations.append(difference(old, port))
        return operations


def difference(old: ServicePort | None, new: ServicePort) -> Operation:
    """The smallest operation that turns `old` into `new` (which must differ)."""
    if old is None or not old.same_but_endpoints(new):
        return PutPort(new)
    put4, removed4 = endpoints.diff(old.endpoints4, new.endpoints4, 4)
    put6, removed6 = endpoints.diff(old.endpoints6, new.endpoints6, 6)
    if len(put4) + len(put6) + len(removed4) + len(removed6) >= len(new.endpoints4) + len(new.endpoints6):
        return PutPort(new)
    return PatchEndpoints(new.key, put4, removed4, put6, removed6)


def patched(old: ServicePort, operation: PatchEndpoints) -> ServicePort:
    """The service port after a patch of its endpoints."""
    return msgspec.structs.replace(
        old,
        endpoints4=endpoints.patch(old.endpoints4, operation.put4, operation.removed4, 4),
        endpoints6=endpoints.patch(old.endpoints6, operation.put6, operation.removed6, 6),
    )
