"""A tenant's model: incremental equals full, deltas lead to the same content and the same digest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.model import endpoints
from vcproxy.model.endpoints import READY, SERVING, Endpoint
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.model.tenant import (
    EMPTY_DIGEST,
    ModelMismatch,
    PatchEndpoints,
    PutPort,
    RemovePort,
    TenantModel,
    port_hash,
)


def service_port(name: str, hosts: list[int], *, local: bool = False, health: int = 0) -> ServicePort:
    packed4, packed6, hints = endpoints.pack(Endpoint(bytes((10, 0, 0, n)), 80, READY | SERVING) for n in hosts)
    key = PortKey("default", name, "http", Protocol.TCP)
    frontend = Frontend(FrontendKind.CLUSTER_IP, bytes((10, 32, 0, 1)), 80)
    return ServicePort(
        key,
        (frontend,),
        internal_local=local,
        hint_sets=hints,
        endpoints4=packed4,
        endpoints6=packed6,
        health_check_node_port=health,
    )


ports = st.builds(
    service_port,
    st.sampled_from("abc"),
    st.lists(st.integers(0, 20), unique=True, max_size=12),
    local=st.booleans(),
    health=st.sampled_from([0, 30081]),
)
steps = st.lists(st.one_of(ports, st.sampled_from("abc")), max_size=20)


def run(model: TenantModel, events: list[ServicePort | str]) -> list[object]:
    operations = []
    for event in events:
        operations.append(
            model.remove(PortKey("default", event, "http", Protocol.TCP))
            if isinstance(event, str)
            else model.put(event)
        )
    return [operation for operation in operations if operation is not None]


@given(steps)
def test_incremental_equals_full(events: list[ServicePort | str]) -> None:
    model = TenantModel()
    run(model, events)
    full = TenantModel(model)
    assert full.digest == model.digest
    assert dict(full.ports) == dict(model.ports)


@given(steps, steps)
def test_operations_lead_to_the_same_content(first: list[ServicePort | str], then: list[ServicePort | str]) -> None:
    model, follower = TenantModel(), TenantModel()
    run(model, first)
    follower.apply(TenantModel().diff(model))
    assert follower.digest == model.digest
    operations = run(model, then)
    follower.apply(operations)  # type: ignore[arg-type]
    assert follower.digest == model.digest
    assert dict(follower.ports) == dict(model.ports)


@given(steps, steps)
def test_diff_turns_one_into_the_other(first: list[ServicePort | str], then: list[ServicePort | str]) -> None:
    old, new = TenantModel(), TenantModel()
    run(old, first)
    run(new, then)
    touched = old.apply(old.diff(new))
    assert old.digest == new.digest
    assert dict(old.ports) == dict(new.ports)
    assert all(key.namespace == "default" for key in touched)


def test_nothing_changed_is_no_operation() -> None:
    model = TenantModel([service_port("a", [1])])
    assert model.put(service_port("a", [1])) is None
    assert model.remove(PortKey("default", "b", "http", Protocol.TCP)) is None


def test_one_endpoint_of_many_is_a_patch_of_one_record() -> None:
    model = TenantModel([service_port("a", list(range(100)))])
    operation = model.put(service_port("a", list(range(101))))
    assert isinstance(operation, PatchEndpoints)
    assert len(operation.put4) == endpoints.ENDPOINT4.itemsize
    assert operation.removed4 == b""


def test_a_policy_change_puts_the_whole_port() -> None:
    model = TenantModel([service_port("a", [1, 2, 3])])
    assert isinstance(model.put(service_port("a", [1, 2, 3], local=True)), PutPort)
    assert isinstance(model.remove(service_port("a", []).key), RemovePort)
    assert model.digest == EMPTY_DIGEST


def test_patch_of_an_unknown_port_is_a_mismatch() -> None:
    with pytest.raises(ModelMismatch, match="default/a:http/TCP"):
        TenantModel().apply([PatchEndpoints(service_port("a", []).key)])


def test_the_digest_is_documented_and_stable() -> None:
    """Brains and nodes of different versions compare digests: changing the canonical form is a protocol change."""
    assert port_hash(service_port("a", [1])).to_bytes(32, "big").hex() == (
        "6b9081598e64768644ba30a49fbf55671de50ba177457e0076c996abc082cc7c"
    )
    assert port_hash(service_port("a", [1], health=30081)).to_bytes(32, "big").hex() == (
        "72ecb3d66629ca8da0f56b9ca6f69b009fabe0b6076fe42b37f3f7382d118791"
    )
    assert (
        TenantModel([service_port("a", [1]), service_port("b", [])]).digest
        == TenantModel([service_port("b", []), service_port("a", [1])]).digest
    )
