"""Local traffic policies on one node: what drops, and what a load balancer is told; the cases of kube-proxy's tests."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.backend import Kernel
from tests.unit.node.conftest import FACTS, NODE, MakeRig, service_port
from vcproxy.model.addresses import parse_address
from vcproxy.model.endpoints import READY, SERVING, TERMINATING, Endpoint, name_id, pack
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.model.tenant import Tenant, TenantModel
from vcproxy.node.holdings import Held
from vcproxy.node.localpolicy import HealthCheck, LocalPorts, ServiceId, Unserved, local_ports

HERE, THERE = name_id("here"), name_id("there")
WEB = ServiceId("super", "default", "web")
VIPS = {4: parse_address("10.96.0.10"), 6: parse_address("fd00:96::10")}

# Conditions of an endpoint, in Kubernetes' words.
ready, unready = READY | SERVING, 0
terminating, gone = SERVING | TERMINATING, TERMINATING


def port(
    *endpoints: tuple[str, int, int],
    name: str = "http",
    service: str = "web",
    families: tuple[int, ...] = (4,),
    internal: bool = False,
    external: bool = True,
    health: int = 32000,
) -> ServicePort:
    """A service port with endpoints (address, flags, node)."""
    packed4, packed6, hints = pack(Endpoint(parse_address(ip), 8080, flags, node) for ip, flags, node in endpoints)
    return ServicePort(
        PortKey("default", service, name, Protocol.TCP),
        tuple(Frontend(FrontendKind.CLUSTER_IP, VIPS[family], 80) for family in families),
        internal_local=internal,
        external_local=external,
        hint_sets=hints,
        endpoints4=packed4,
        endpoints6=packed6,
        health_check_node_port=health,
    )


def told(*ports: ServicePort) -> LocalPorts:
    made = LocalPorts()
    made.update("super", local_ports(ports, HERE))
    return made


@pytest.mark.parametrize(
    ("endpoints", "count"),
    [
        ([], 0),
        ([("10.1.0.1", ready, HERE)], 1),
        ([("10.1.0.1", ready, HERE), ("10.1.0.2", ready, HERE)], 2),
        ([("10.1.0.1", ready, HERE), ("10.1.0.2", ready, THERE)], 1),
        ([("10.1.0.1", ready, THERE)], 0),
        ([("10.1.0.1", ready, 0)], 0),
        ([("10.1.0.1", unready, HERE)], 0),
        ([("10.1.0.1", SERVING, HERE)], 0),
        ([("10.1.0.1", terminating, HERE)], 0),  # it still serves, but new connections should go elsewhere
        ([("10.1.0.1", gone, HERE)], 0),
        ([("10.1.0.1", terminating, HERE), ("10.1.0.2", ready, HERE)], 1),
        ([("fd00:1::1", ready, HERE)], 0),  # the other family has a listener of its own
    ],
)
def test_local_ready_endpoints(endpoints: list[tuple[str, int, int]], count: int) -> None:
    assert told(port(*endpoints)).ready(WEB, 4) == count


def test_an_address_counts_once_over_all_ports_of_the_service() -> None:
    both, one, other = ("10.1.0.1", ready, HERE), ("10.1.0.2", ready, HERE), ("10.1.0.3", ready, HERE)
    found = told(
        port(both, one, name="http"), port(both, other, name="admin"), port(("10.1.0.9", ready, HERE), service="else")
    )
    assert found.ready(WEB, 4) == 3
    assert found.checks == {WEB: HealthCheck(32000, (4,)), WEB._replace(name="else"): HealthCheck(32000, (4,))}


def test_each_family_of_the_service_is_told_its_own() -> None:
    found = told(
        port(("10.1.0.1", ready, HERE), ("fd00:1::1", ready, HERE), ("fd00:1::2", ready, HERE), families=(4, 6))
    )
    assert (found.ready(WEB, 4), found.ready(WEB, 6)) == (1, 2)
    assert found.checks[WEB] == HealthCheck(32000, (4, 6))


def test_a_port_that_is_not_served_here_has_no_endpoints_to_tell_of() -> None:
    served, refused = port(("10.1.0.1", ready, HERE)), port(("10.1.0.2", ready, HERE), name="admin")
    found = LocalPorts()
    found.update("super", local_ports([served, refused], HERE), refused=[refused.key])
    assert found.ready(WEB, 4) == 1
    found.update("super", local_ports([refused], HERE), tried=[refused.key])
    assert found.ready(WEB, 4) == 2


BOTH = {"internal": True, "external": True}


@pytest.mark.parametrize(
    ("endpoints", "policies", "unserved"),
    [
        # TestNoEndpointsMetric of kube-proxy's proxiers
        ([("10.1.0.1", ready, HERE)], BOTH, set()),
        ([("10.1.0.1", ready, THERE)], {"internal": True, "external": False}, {"internal"}),
        ([("10.1.0.1", ready, THERE)], {"internal": False, "external": True}, {"external"}),
        ([("10.1.0.1", ready, THERE)], BOTH, {"internal", "external"}),
        ([("10.1.0.1", ready, THERE)], {"internal": False, "external": False}, set()),
        ([], BOTH, set()),  # no endpoints at all: that is rejected, not dropped
        ([("10.1.0.1", terminating, HERE), ("10.1.0.2", ready, THERE)], BOTH, set()),
        ([("10.1.0.1", unready, HERE), ("10.1.0.2", ready, THERE)], BOTH, {"internal", "external"}),
        ([("10.1.0.1", unready, THERE)], BOTH, set()),
        ([("10.1.0.1", terminating, THERE)], BOTH, {"internal", "external"}),
    ],
)
def test_no_local_endpoints(
    endpoints: list[tuple[str, int, int]], policies: dict[str, bool], unserved: set[str]
) -> None:
    found = told(port(*endpoints, health=0, **policies))
    assert dict(found.unserved("super")) == {Unserved(policy, "IPv4"): 1 for policy in unserved}


def test_checks_are_announced_when_they_change_and_not_with_endpoints() -> None:
    found, announced = told(port(("10.1.0.1", ready, HERE))), []
    found.changed = lambda services: announced.append({service: found.checks.get(service) for service in services})
    found.update("super", local_ports([port()], HERE), tried=[port().key])
    assert announced == [], "its endpoints are asked for, not announced"
    found.update("super", local_ports([port(health=32001)], HERE), tried=[port().key])
    assert announced.pop() == {WEB: HealthCheck(32001, (4,))}
    found.update("super", local_ports([port(health=0, external=False)], HERE), tried=[port().key])
    assert announced.pop() == {WEB: None}
    found.update("acme", local_ports([port()], HERE))
    assert announced.pop() == {WEB._replace(tenant="acme"): HealthCheck(32000, (4,))}
    found.forget("acme")
    assert announced.pop() == {WEB._replace(tenant="acme"): None}
    found.forget("nobody")
    found.update("super", local_ports([port()], HERE))
    announced.clear()
    found.accept_on((VIPS[4],))
    assert announced.pop().keys() == {WEB}
    found.accept_on((VIPS[4],))
    assert not announced


CHOICES = [
    port(*endpoints, name=name, families=families, internal=internal, external=external, health=health * external)
    for endpoints, name, families, internal, external, health in itertools.product(
        ([], [("10.1.0.1", ready, HERE)], [("10.1.0.2", ready, HERE), ("fd00:1::1", ready, THERE)]),
        ("http", "admin"),
        ((4,), (4, 6)),
        (True, False),
        (True, False),
        (0, 32000),
    )
]


@given(st.lists(st.lists(st.sampled_from(CHOICES) | st.sampled_from(["http", "admin"]), max_size=3), max_size=8))
def test_incremental_equals_full(updates: list[list[ServicePort | str]]) -> None:
    kept: dict[PortKey, ServicePort] = {}
    found = LocalPorts()
    for update in updates:
        put = {one.key: one for one in update if isinstance(one, ServicePort)}
        gone = {PortKey("default", "web", one, Protocol.TCP) for one in update if isinstance(one, str)} - put.keys()
        kept = {key: one for key, one in {**kept, **put}.items() if key not in gone}
        found.update("super", local_ports(tuple(put.values()), HERE), tried=put.keys() | gone)
        full = told(*kept.values())
        assert dict(found.checks) == dict(full.checks)
        assert +found.unserved("super") == +full.unserved("super")
        assert [found.ready(WEB, family) for family in (4, 6)] == [full.ready(WEB, family) for family in (4, 6)]


async def test_an_adopted_tenants_load_balancers_are_answered_before_the_brain_speaks(make_rig: MakeRig) -> None:
    web = msgspec.structs.replace(port(("10.1.0.1", ready, name_id(NODE))), frontends=service_port("web").frontends)
    kernel = Kernel()
    first = await make_rig(kernel=kernel, facts=FACTS)
    first.sync("acme", web)
    await first.settle()
    remembered = Held(Tenant("acme", "acme"), TenantModel([web]), 1, "brain-1", synced=True)
    second = await make_rig(kernel=kernel, remembered=[remembered], facts=FACTS)
    assert second.agent.adopted == {"acme"}
    service, local = WEB._replace(tenant="acme"), second.agent.progress.local
    assert local.checks == {service: HealthCheck(32000, (4,))}
    assert local.ready(service, 4) == 1
    second.sync("acme")
    await second.settle()
    assert local.checks == {}


async def test_a_rejected_port_is_told_to_nobody(make_rig: MakeRig) -> None:
    web = port(("10.1.0.1", ready, name_id(NODE)))
    rig = await make_rig(facts=FACTS)
    rig.backend.refuse = lambda uid, key: "its node port is another's"
    rig.sync("acme", web)
    await rig.settle()
    service, local = WEB._replace(tenant="acme"), rig.agent.progress.local
    assert (local.checks[service].port, local.ready(service, 4)) == (32000, 0)
    rig.backend.refuse = lambda uid, key: ""
    await rig.settle(after=60)
    assert local.ready(service, 4) == 1
    rig.remove("acme")
    await rig.settle()
    assert local.checks == {}
