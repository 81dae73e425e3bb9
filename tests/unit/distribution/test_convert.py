"""What a node accepts from the wire: the model's invariants, and nothing that breaks one."""

from collections.abc import Callable

import pytest
from hypothesis import given

from tests.unit.distribution.models import models, ports
from vcproxy.brain.encoding import CHUNK_OCTETS, Snapshot, Version, encode_operations, operations_bound, port_bound
from vcproxy.model.addresses import parse_prefix
from vcproxy.model.endpoints import READY, Endpoint, HintSet, pack
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.model.tenant import PatchEndpoints, PutPort, RemovePort, Tenant, TenantModel
from vcproxy.pb import convert, distribution_pb2, model_pb2
from vcproxy.pb.convert import MalformedModel

KEY = PortKey("default", "web", "http", Protocol.TCP)
PACKED4, PACKED6, HINTS = pack(
    Endpoint(address, 8080, READY, 7, HintSet((1,), ()))
    for address in (b"\x0a\0\0\1", b"\x0a\0\0\2", bytes(15) + b"\1", bytes(15) + b"\2")
)
PORT = ServicePort(
    key=KEY,
    frontends=(
        Frontend(FrontendKind.CLUSTER_IP, b"\x0a\x20\0\1", 80),
        Frontend(FrontendKind.NODE_PORT, bytes(4), 30080),
    ),
    external_local=True,
    affinity_seconds=10800,
    source_ranges=(parse_prefix("192.0.2.0/24"), parse_prefix("2001:db8::/32")),
    hint_sets=HINTS,
    endpoints4=PACKED4,
    endpoints6=PACKED6,
    health_check_node_port=32000,
)


def through_the_wire(message: model_pb2.ServicePort) -> model_pb2.ServicePort:
    return model_pb2.ServicePort.FromString(message.SerializeToString())


@given(ports)
def test_a_service_port_comes_back_equal(port: ServicePort) -> None:
    assert convert.decode_port("t", through_the_wire(convert.encode_port(port))) == port


@given(ports)
def test_a_port_takes_no_more_octets_than_reckoned(port: ServicePort) -> None:
    assert model_pb2.ServicePorts(ports=[convert.encode_port(port)]).ByteSize() <= port_bound(port)
    for operation in (
        PutPort(port),
        RemovePort(port.key),
        PatchEndpoints(port.key, port.endpoints4, port.endpoints4[:6], port.endpoints6, port.endpoints6[:18]),
    ):
        assert len(encode_operations([operation])) <= operations_bound([operation])


@given(models)
def test_parts_of_a_snapshot_are_small_and_complete(model: TenantModel) -> None:
    snapshot = Snapshot("t", Version(3, model.digest), model)
    assert len(snapshot) >= 1
    for index in range(len(snapshot)):
        assert len(snapshot.part(index)) <= CHUNK_OCTETS
        assert snapshot.part(index) is snapshot.part(index), "encoded once"


def _set(message: model_pb2.ServicePort, path: str, value: object) -> None:
    *parents, name = path.split(".")
    target: object = message
    for parent in parents:
        target = target[int(parent)] if parent.isdigit() else getattr(target, parent)  # type: ignore[index]
    setattr(target, name, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("key.protocol", 0),
        ("key.protocol", 1),
        ("key.namespace", ""),
        ("key.service", "a/b"),
        ("key.service", "a" * 254),
        ("key.port", 'x"; drop'),
        ("frontends.0.kind", 0),
        ("frontends.0.kind", 9),
        ("frontends.0.address", b""),
        ("frontends.0.address", b"\x0a\0\0"),
        ("frontends.0.address", bytes(4)),
        ("frontends.0.address", bytes(17)),
        ("frontends.0.port", 0),
        ("frontends.0.port", 65536),
        ("frontends.1.address", b"\x0a\0\0\1"),
        ("affinity_seconds", 86401),
        ("health_check_node_port", 65536),
        ("external_local", False),
        ("source_ranges.0.length", 33),
        ("source_ranges.0.address", b"\xc0\0\2\1"),
        ("source_ranges.0.address", b"\xc0\0\2"),
        ("endpoints4", PACKED4[:-1]),
        ("endpoints4", PACKED4[17:] + PACKED4[:17]),
        ("endpoints4", PACKED4[:17] * 2),
        ("endpoints4", PACKED4[:4] + b"\0\0" + PACKED4[6:]),
        ("endpoints4", PACKED4[:6] + b"\2\0" + PACKED4[8:]),
        ("endpoints4", PACKED4[:6] + b"\0\1" + PACKED4[8:]),
        ("endpoints4", PACKED4[:8] + b"\x08" + PACKED4[9:]),
        ("endpoints6", PACKED4),
        ("endpoints6", PACKED6[29:] + PACKED6[:29]),
        ("endpoints6", PACKED6[:16] + b"\0\0" + PACKED6[18:]),
    ],
)
def test_a_bad_service_port_is_refused_by_name(path: str, value: object) -> None:
    message = convert.encode_port(PORT)
    _set(message, path, value)
    with pytest.raises(MalformedModel) as caught:
        convert.decode_port("acme-1", through_the_wire(message))
    assert caught.value.tenant == "acme-1"
    assert path.startswith("key") or caught.value.key == KEY
    assert "acme-1" in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.frontends.extend([m.frontends[0]]),
        lambda m: m.hint_sets.extend([m.hint_sets[0]]),
        lambda m: m.hint_sets.extend([model_pb2.HintSet()]),
        lambda m: m.hint_sets.extend([model_pb2.HintSet(zones=[5, 4])]),
        lambda m: m.hint_sets.extend([model_pb2.HintSet(nodes=[4, 4])]),
    ],
)
def test_what_is_not_sorted_and_unique_is_refused(spoil: Callable[[model_pb2.ServicePort], None]) -> None:
    message = convert.encode_port(PORT)
    spoil(message)
    with pytest.raises(MalformedModel):
        convert.decode_port("acme-1", through_the_wire(message))


@pytest.mark.parametrize(
    "operation",
    [
        model_pb2.Operation(),
        model_pb2.Operation(put=model_pb2.ServicePort()),
        model_pb2.Operation(remove=model_pb2.PortKey(namespace="a", service="b", protocol=7)),
        *[
            model_pb2.Operation(patch=model_pb2.PatchEndpoints(key=convert.encode_key(KEY), **columns))
            for columns in (
                {"put4": PACKED4[:-1]},
                {"put4": PACKED4[17:] + PACKED4[:17]},
                {"put6": PACKED4},
                {"removed4": PACKED4[:5]},
                {"removed4": PACKED4[17:23] + PACKED4[:6]},
                {"removed6": PACKED6[:17]},
            )
        ],
    ],
)
def test_a_bad_operation_is_refused(operation: model_pb2.Operation) -> None:
    with pytest.raises(MalformedModel):
        convert.decode_operation("acme-1", operation)


@pytest.mark.parametrize("uid", ["", "A", "-a", "a/b", "a b", "..", "a\n", "a" * 64, "ä"])
def test_a_uid_that_cannot_be_is_refused(uid: str) -> None:
    with pytest.raises(MalformedModel):
        convert.decode_tenant(distribution_pb2.TenantAdded(tenant=uid, name="x"))


def test_facts_come_back_equal() -> None:
    tenant = Tenant("acme-1", "Acme (prod)", (parse_prefix("10.32.0.0/16"), parse_prefix("fd00:32::/108")))
    assert convert.decode_tenant(convert.encode_tenant(tenant, {})) == tenant
    facts = NodeFacts("zone-a", (b"\x0a\0\0\1", bytes(16)), (parse_prefix("10.1.0.0/24"),), eligible=False)
    assert convert.decode_facts(convert.encode_facts(facts)) == facts
    with pytest.raises(MalformedModel):
        convert.decode_facts(distribution_pb2.NodeFacts(addresses=[b"123"]))
