"""Local traffic policies on one node: what drops, and what a load balancer is told; the cases of kube-proxy's tests."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.model.addresses import parse_address
from vcproxy.model.endpoints import READY, SERVING, TERMINATING, Endpoint, name_id, pack
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
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
    found.changed = lambda: announced.append(dict(found.checks))
    found.update("super", local_ports([port()], HERE), tried=[port().key])
    assert announced == [], "its endpoints are asked for, not announced"
    found.update("super", local_ports([port(health=32001)], HERE), tried=[port().key])
    assert announced.pop() == {WEB: HealthCheck(32001, (4,))}
    found.update("super", local_ports([port(health=0, external=False)], HERE), tried=[port().key])
    assert announced.pop() == {}
    found.update("acme", local_ports([port()], HERE))
    assert announced.pop() == {WEB._replace(tenant="acme"): HealthCheck(32000, (4,))}
    found.forget("acme")
    assert announced.pop() == {}
    found.forget("nobody")
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
