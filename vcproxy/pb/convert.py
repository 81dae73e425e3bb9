"""Between the model and its protobuf form. Encoding trusts its input; decoding trusts nothing.

Both ends are this program and the stream is authenticated, yet a node checks what it is sent as if a tenant had sent
it: what passes here goes into kernel keys as it is. The checks are the model's invariants, no more and no less: octets
and ranges of every number, canonical order of everything that the digest covers. What fails raises MalformedModel,
which names tenant, service port and field; the caller refuses that tenant's update and keeps what it has.

Packed endpoints are checked by strides (`packed[8::17]` are all flags): C speed without building an array per port.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from operator import or_

from vcproxy.model import endpoints
from vcproxy.model.addresses import Prefix
from vcproxy.model.endpoints import HintSet
from vcproxy.model.mark import Mark, Position
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.model.tenant import DIGEST_OCTETS, Operation, PatchEndpoints, PutPort, RemovePort, Tenant
from vcproxy.model.timing import Timing
from vcproxy.pb import distribution_pb2, model_pb2

MAX_AFFINITY_SECONDS = 86400  # core/v1 ClientIPConfig.timeoutSeconds
LONGEST_NAME = 253
LONGEST_TENANT_NAME = 1024
MOST_KINDS = 16

_UID = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_PROTOCOLS = {int(protocol): protocol for protocol in Protocol}
_KINDS = {int(kind): kind for kind in FrontendKind}
_FLAGS = endpoints.READY | endpoints.SERVING | endpoints.TERMINATING


class MalformedModel(ValueError):
    """What was received breaks an invariant of the model. `tenant` and `key` say whose it is ("" and None: unknown)."""

    def __init__(self, tenant: str, key: PortKey | None, problem: str) -> None:
        where = f"tenant {tenant!r}" + (f", service port {key}" if key else "")
        super().__init__(f"{where}: {problem}; the sender has a defect, what is held stays")
        self.tenant = tenant
        self.key = key
        self.problem = problem


def encode_key(key: PortKey) -> model_pb2.PortKey:
    """A service port's identity."""
    return model_pb2.PortKey(namespace=key.namespace, service=key.service, port=key.port, protocol=key.protocol)


def decode_key(tenant: str, message: model_pb2.PortKey) -> PortKey:
    """Raises MalformedModel for an unknown protocol or a name that no Kubernetes object can have."""
    protocol = _PROTOCOLS.get(message.protocol)
    if protocol is None:
        raise MalformedModel(tenant, None, f"protocol {message.protocol} is none of TCP 6, UDP 17, SCTP 132")
    for field, text in (("namespace", message.namespace), ("service", message.service)):
        if not _NAME.fullmatch(text):
            raise MalformedModel(tenant, None, f"{field} {text[:64]!r} is not a Kubernetes name")
    if message.port and not _NAME.fullmatch(message.port):
        raise MalformedModel(tenant, None, f"port name {message.port[:64]!r} is not a Kubernetes name")
    return PortKey(message.namespace, message.service, message.port, protocol)


def encode_port(port: ServicePort) -> model_pb2.ServicePort:
    """A service port, whole."""
    return model_pb2.ServicePort(
        key=encode_key(port.key),
        frontends=[
            model_pb2.Frontend(kind=int(f.kind), address=f.address, port=f.port)  # type: ignore[arg-type]
            for f in port.frontends
        ],
        internal_local=port.internal_local,
        external_local=port.external_local,
        affinity_seconds=port.affinity_seconds,
        source_ranges=encode_prefixes(port.source_ranges),
        hint_sets=[model_pb2.HintSet(zones=h.zones, nodes=h.nodes) for h in port.hint_sets],
        endpoints4=port.endpoints4,
        endpoints6=port.endpoints6,
        health_check_node_port=port.health_check_node_port,
    )


def decode_port(tenant: str, message: model_pb2.ServicePort) -> ServicePort:
    """A service port, checked. Raises MalformedModel."""
    key = decode_key(tenant, message.key)

    def refuse(problem: str) -> MalformedModel:
        return MalformedModel(tenant, key, problem)

    if message.affinity_seconds > MAX_AFFINITY_SECONDS:
        raise refuse(f"affinity of {message.affinity_seconds} s is more than a day")
    if message.health_check_node_port > (0xFFFF if message.external_local else 0):
        raise refuse(f"health-check node port {message.health_check_node_port} is none, or without a Local policy")
    port = ServicePort(
        key=key,
        frontends=tuple([_frontend(f, refuse) for f in message.frontends]),
        internal_local=message.internal_local,
        external_local=message.external_local,
        affinity_seconds=message.affinity_seconds,
        source_ranges=decode_prefixes(message.source_ranges, refuse),
        hint_sets=tuple([_hint_set(h, refuse) for h in message.hint_sets]),
        endpoints4=message.endpoints4,
        endpoints6=message.endpoints6,
        health_check_node_port=message.health_check_node_port,
    )
    if not _ascending(port.frontends):
        raise refuse("frontends are not sorted or hold one twice")
    if not _ascending(port.hint_sets):
        raise refuse("hint sets are not sorted or hold one twice")
    check_endpoints(tenant, port)
    return port


def check_endpoints(tenant: str, port: ServicePort) -> None:
    """Check a service port's packed endpoints, as after a patch. Raises MalformedModel."""
    for family, packed in ((4, port.endpoints4), (6, port.endpoints6)):
        problem = _records_problem(packed, family, len(port.hint_sets))
        if problem:
            raise MalformedModel(tenant, port.key, f"IPv{family} endpoints: {problem}")


def _records_problem(packed: bytes, family: int, hint_sets: int) -> str:
    if not packed:
        return ""
    if not endpoints.is_canonical(packed, family):
        return "not whole records, sorted and unique"
    size = endpoints.endpoint_dtype(family).itemsize
    at = 4 if family == 4 else 16
    if 0 in map(or_, packed[at::size], packed[at + 1 :: size]):
        return "a port is 0"
    low, high = packed[at + 2 :: size], packed[at + 3 :: size]
    if max(high) or max(low) > min(hint_sets, 0xFF):
        largest = max(a | b << 8 for a, b in zip(low, high, strict=True))
        if largest > hint_sets:
            return f"hint {largest} of {hint_sets} hint sets"
    if max(packed[at + 4 :: size]) > _FLAGS:
        return "unknown flags"
    return ""


def _targets_problem(packed: bytes, family: int) -> str:
    size = endpoints.target_dtype(family).itemsize
    if len(packed) % size:
        return "not whole targets"
    if not _ascending([packed[at : at + size] for at in range(0, len(packed), size)]):
        return "targets are not sorted or hold one twice"
    return ""


def _frontend(message: model_pb2.Frontend, refuse: Callable[[str], MalformedModel]) -> Frontend:
    kind, address = _KINDS.get(message.kind), message.address
    if kind is None:
        raise refuse(f"frontend kind {message.kind} is unknown")
    if len(address) not in (4, 16):
        raise refuse(f"a frontend's address has {len(address)} octets, not 4 or 16")
    if not 0 < message.port <= 0xFFFF:
        raise refuse(f"frontend port {message.port} is not 1..65535")
    if any(address) == (kind is FrontendKind.NODE_PORT):
        raise refuse(f"a {kind.name} frontend with address {address.hex()}")
    return Frontend(kind, address, message.port)


def _hint_set(message: model_pb2.HintSet, refuse: Callable[[str], MalformedModel]) -> HintSet:
    hints = HintSet(tuple(message.zones), tuple(message.nodes))
    if not (hints.zones or hints.nodes) or not (_ascending(hints.zones) and _ascending(hints.nodes)):
        raise refuse("a hint set is empty, or not sorted and unique")
    return hints


def _ascending(items: Sequence[object]) -> bool:
    return len(items) < 2 or all(a < b for a, b in pairwise(items))  # type: ignore[operator]


def encode_prefixes(prefixes: Iterable[Prefix]) -> list[model_pb2.Prefix]:
    """Prefixes in their order."""
    return [model_pb2.Prefix(address=p.address, length=p.length) for p in prefixes]


def decode_prefixes(
    messages: Iterable[model_pb2.Prefix], refuse: Callable[[str], MalformedModel]
) -> tuple[Prefix, ...]:
    """Prefixes in their order; what `refuse` makes is raised for one with wrong octets, length or host bits."""
    prefixes = []
    for message in messages:
        address, length = message.address, message.length
        if len(address) not in (4, 16) or length > len(address) * 8:
            raise refuse(f"a prefix of {len(address)} octets and length {length}")
        if int.from_bytes(address, "big") & ((1 << (len(address) * 8 - length)) - 1):
            raise refuse(f"prefix {address.hex()}/{length} has host bits")
        prefixes.append(Prefix(address, length))
    return tuple(prefixes)


def encode_operation(operation: Operation) -> model_pb2.Operation:
    """One step of a delta."""
    match operation:
        case PutPort(port):
            return model_pb2.Operation(put=encode_port(port))
        case RemovePort(key):
            return model_pb2.Operation(remove=encode_key(key))
        case PatchEndpoints(key, put4, removed4, put6, removed6):
            return model_pb2.Operation(
                patch=model_pb2.PatchEndpoints(
                    key=encode_key(key), put4=put4, removed4=removed4, put6=put6, removed6=removed6
                )
            )


def decode_operation(tenant: str, message: model_pb2.Operation) -> Operation:
    """One step of a delta, checked. Raises MalformedModel.

    The hints of a patch refer to a port that only the receiver holds: it calls `check_endpoints` on the result.
    """
    match message.WhichOneof("operation"):
        case "put":
            return PutPort(decode_port(tenant, message.put))
        case "remove":
            return RemovePort(decode_key(tenant, message.remove))
        case "patch":
            patch = message.patch
            key = decode_key(tenant, patch.key)
            problem = (
                _records_problem(patch.put4, 4, endpoints.MAX_HINT_SETS)
                or _records_problem(patch.put6, 6, endpoints.MAX_HINT_SETS)
                or _targets_problem(patch.removed4, 4)
                or _targets_problem(patch.removed6, 6)
            )
            if problem:
                raise MalformedModel(tenant, key, f"patch of endpoints: {problem}")
            return PatchEndpoints(key, patch.put4, patch.removed4, patch.put6, patch.removed6)
    raise MalformedModel(tenant, None, "an operation of unknown kind")


def encode_timing(timing: Timing | None) -> distribution_pb2.Timing | None:
    """None stays None: the field is left out."""
    if timing is None:
        return None
    return distribution_pb2.Timing(event=timing.event, received=timing.received, compiled=timing.compiled)


def decode_timing(message: distribution_pb2.Timing) -> Timing | None:
    """None if nothing is known."""
    timing = Timing(message.event, message.received, message.compiled)
    return timing if timing != Timing() else None


def encode_mark(mark: Mark) -> list[distribution_pb2.Position]:
    """How new a content is."""
    return [
        distribution_pb2.Position(kind=kind, changed=at.changed, seen=at.seen, epoch=at.epoch)
        for kind, at in mark.items()
    ]


def decode_mark(tenant: str, messages: Sequence[distribution_pb2.Position]) -> Mark:
    """A mark, checked; empty if there is none. Raises MalformedModel."""
    mark = {said.kind: Position(said.changed, said.seen, said.epoch) for said in messages}
    if len(messages) > MOST_KINDS or len(mark) < len(messages) or any(len(kind) > LONGEST_NAME for kind in mark):
        raise MalformedModel(tenant, None, f"a mark of {len(messages)} kinds, or one twice, or with a long name")
    return mark


def encode_tenant(tenant: Tenant, mark: Mark) -> distribution_pb2.TenantAdded:
    """A tenant's facts, and where the brain is with it."""
    return distribution_pb2.TenantAdded(
        tenant=tenant.uid,
        name=tenant.name,
        virtual_ranges=encode_prefixes(tenant.virtual_ranges),
        mark=encode_mark(mark),
    )


def decode_tenant(message: distribution_pb2.TenantAdded) -> Tenant:
    """A tenant's facts, checked. Raises MalformedModel."""
    uid = decode_uid(message.tenant)
    if len(message.name) > LONGEST_TENANT_NAME:
        raise MalformedModel(uid, None, f"the tenant's name has more than {LONGEST_TENANT_NAME} characters")
    ranges = decode_prefixes(message.virtual_ranges, lambda problem: MalformedModel(uid, None, problem))
    return Tenant(uid, message.name, ranges)


def decode_uid(uid: str) -> str:
    """The uid itself. Raises MalformedModel if it cannot be one: it becomes part of file names and set keys."""
    if not _UID.fullmatch(uid):
        raise MalformedModel(uid[:64], None, "the tenant's uid does not match [a-z0-9][a-z0-9.-]{0,62}")
    return uid


def decode_digest(tenant: str, digest: bytes) -> bytes:
    """The digest itself. Raises MalformedModel if it has not 32 octets."""
    if len(digest) != DIGEST_OCTETS:
        raise MalformedModel(tenant, None, f"a digest has {len(digest)} octets, not {DIGEST_OCTETS}")
    return digest


def decode_address(address: bytes) -> bytes:
    """The address itself. Raises MalformedModel if it has neither 4 nor 16 octets."""
    if len(address) not in (4, 16):
        raise MalformedModel("", None, f"an address has {len(address)} octets, not 4 or 16")
    return address


def encode_facts(facts: NodeFacts) -> distribution_pb2.NodeFacts:
    """Facts of the node that watches."""
    return distribution_pb2.NodeFacts(
        zone=facts.zone,
        addresses=facts.addresses,
        pod_ranges=encode_prefixes(facts.pod_ranges),
        ineligible=not facts.eligible,
    )


def decode_facts(message: distribution_pb2.NodeFacts) -> NodeFacts:
    """Facts of this node, checked. Raises MalformedModel."""
    if len(message.zone) > LONGEST_NAME:
        raise MalformedModel("", None, f"the node's zone has more than {LONGEST_NAME} characters")
    return NodeFacts(
        zone=message.zone,
        addresses=tuple([decode_address(address) for address in message.addresses]),
        pod_ranges=decode_prefixes(message.pod_ranges, lambda problem: MalformedModel("", None, problem)),
        eligible=not message.ineligible,
    )
