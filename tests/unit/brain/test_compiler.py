"""What kube-proxy makes of Services and EndpointSlices, as tables, in Kubernetes' words."""

from __future__ import annotations

import pytest

from tests.unit.brain.kinds import endpoint_slice, service
from vcproxy.brain.compiler import compile_service
from vcproxy.brain.guard import UNRESTRICTED, Policy, PortRange, Reason, Unusable
from vcproxy.model.addresses import format_target, parse_address, parse_prefix
from vcproxy.model.endpoints import READY, SERVING, TERMINATING, HintSet, name_id, unpack
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort

CLUSTER, EXTERNAL, BALANCER, NODE_PORT = FrontendKind


def ports(*objects, policy: Policy = UNRESTRICTED) -> dict[tuple[str, str], ServicePort]:
    """(port name, protocol) -> what was compiled of one Service and its slices."""
    compiled = compile_service(objects[0], objects[1:], policy)
    return {(port.key.port, port.key.protocol.name): port for port in compiled.ports}


def one(*objects, policy: Policy = UNRESTRICTED) -> ServicePort:
    """The only service port."""
    (port,) = ports(*objects, policy=policy).values()
    return port


def dialled(port: ServicePort) -> list[str]:
    """Frontends as text: `KIND address:port`."""
    return [f"{found.kind.name} {format_target(found.address, found.port)}" for found in port.frontends]


def targets(port: ServicePort) -> list[str]:
    """Endpoints as text."""
    packed = [(port.endpoints4, 4), (port.endpoints6, 6)]
    return [format_target(found.address, found.port) for octets, family in packed for found in unpack(octets, family)]


DUAL = {"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"]}


@pytest.mark.parametrize(
    ("why", "found"),
    [
        ("headless: clusterIP None", service(clusterIP="None")),
        ("no clusterIP", service(clusterIP="")),
        ("type ExternalName", service(type="ExternalName", clusterIP="")),
        ("type ExternalName that kept its clusterIP", service(type="ExternalName")),
        ("service-proxy-name", service(labels={"service.kubernetes.io/service-proxy-name": "other"})),
        ("service-proxy-name of any value", service(labels={"service.kubernetes.io/service-proxy-name": ""})),
        ("no ports", service(ports=[])),
        ("families without addresses", service(clusterIPs=[], ipFamilies=["IPv4"])),
        ("a protocol no proxy forwards", service(ports=[{"port": 80, "protocol": "DCCP"}])),
        ("port 0", service(ports=[{"port": 0}])),
    ],
)
def test_not_proxied(why: str, found) -> None:
    assert ports(found, endpoint_slice(["10.0.0.1"])) == {}, why


def test_headless_label_is_of_no_concern_on_a_service() -> None:
    assert one(service(labels={"service.kubernetes.io/headless": ""}))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, ["CLUSTER_IP 10.96.0.1:80"]),
        ({"clusterIP": "fd00::1"}, ["CLUSTER_IP [fd00::1]:80"]),
        ({"clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"]}, ["CLUSTER_IP 10.96.0.1:80"]),
        (DUAL, ["CLUSTER_IP 10.96.0.1:80", "CLUSTER_IP [fd00::1]:80"]),
        (
            {"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.96.0.1"], "ipFamilies": ["IPv6", "IPv4"]},
            ["CLUSTER_IP 10.96.0.1:80", "CLUSTER_IP [fd00::1]:80"],
        ),
        # A second family whose address is not allocated yet.
        ({"clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4", "IPv6"]}, ["CLUSTER_IP 10.96.0.1:80"]),
        # Legacy spellings mean decimal (ParseIPSloppy).
        ({"clusterIP": "010.096.000.001"}, ["CLUSTER_IP 10.96.0.1:80"]),
        ({"clusterIP": " 10.96.0.1 "}, ["CLUSTER_IP 10.96.0.1:80"]),
    ],
)
def test_cluster_ips_by_family(spec, expected) -> None:
    assert dialled(one(service(**spec))) == expected


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"clusterIP": "ten"}, "spec.clusterIP"),
        ({"clusterIPs": ["fd00::1"], "ipFamilies": ["IPv4"]}, "spec.clusterIPs[0]"),
        ({"loadBalancerSourceRanges": ["10.0.0.0/8", "10.0.0.0/99"]}, "spec.loadBalancerSourceRanges"),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}, "spec.session"),
        ({"ports": [{"port": 80}, {"port": 81}]}, "spec.ports"),
        ({"ports": [{"name": "x" * 64, "port": 80}]}, "spec.ports[].name"),
    ],
)
def test_a_service_without_a_safe_meaning_is_unusable(spec, field: str) -> None:
    with pytest.raises(Unusable) as caught:
        ports(service(**spec))
    assert caught.value.field.startswith(field)
    assert caught.value.cure


def test_a_service_port_is_a_name_and_a_protocol() -> None:
    found = service(
        ports=[
            {"name": "dns", "port": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
            {"name": "dns-sctp", "port": 53, "protocol": "SCTP"},
        ]
    )
    compiled = ports(
        found,
        endpoint_slice(
            ["10.0.0.1"],
            ports=[
                {"name": "dns", "protocol": "UDP", "port": 5353},
                {"name": "dns-tcp", "protocol": "TCP", "port": 5354},
                {"name": "dns-sctp", "protocol": "TCP", "port": 5355},  # the name, but another protocol
            ],
        ),
    )
    assert {key: targets(port) for key, port in compiled.items()} == {
        ("dns", "UDP"): ["10.0.0.1:5353"],
        ("dns-tcp", "TCP"): ["10.0.0.1:5354"],
        ("dns-sctp", "SCTP"): [],
    }
    assert compiled["dns", "UDP"].key == PortKey("default", "web", "dns", Protocol.UDP)


@pytest.mark.parametrize(
    ("why", "found", "expected"),
    [
        ("addresses[0] only", endpoint_slice(endpoints=[{"addresses": ["10.0.0.1", "10.0.0.2"]}]), ["10.0.0.1:8080"]),
        ("no addresses", endpoint_slice(endpoints=[{"addresses": []}]), []),
        ("an address of the other family", endpoint_slice(["fd00::5", "10.0.0.1"]), ["10.0.0.1:8080"]),
        ("legacy spelling", endpoint_slice(["010.000.000.041"]), ["10.0.0.41:8080"]),
        ("nil port name", endpoint_slice(["10.0.0.1"], ports=[{"protocol": "TCP", "port": 8080}]), []),
        ("nil port", endpoint_slice(["10.0.0.1"], ports=[{"name": ""}]), []),
        ("port 0", endpoint_slice(["10.0.0.1"], ports=[{"name": "", "port": 0}]), []),
        ("no ports", endpoint_slice(["10.0.0.1"], ports=[]), []),
        ("nil protocol is TCP", endpoint_slice(["10.0.0.1"], ports=[{"name": "", "port": 1}]), ["10.0.0.1:1"]),
        ("another port name", endpoint_slice(["10.0.0.1"], ports=[{"name": "http", "port": 1}]), []),
        ("FQDN", endpoint_slice(["a.example"], address_type="FQDN"), []),
        ("another Service", endpoint_slice(["10.0.0.1"], service="other"), []),
        ("another namespace", endpoint_slice(["10.0.0.1"], namespace="other"), []),
        ("no Service", endpoint_slice(["10.0.0.1"], service=None), []),
        ("headless", endpoint_slice(["10.0.0.1"], labels={"service.kubernetes.io/headless": ""}), []),
        (
            "service-proxy-name is of no concern on a slice",
            endpoint_slice(["10.0.0.1"], labels={"service.kubernetes.io/service-proxy-name": "other"}),
            ["10.0.0.1:8080"],
        ),
        ("a family the Service has not", endpoint_slice(["fd00::5"], address_type="IPv6"), []),
    ],
)
def test_endpoints(why: str, found, expected: list[str]) -> None:
    assert targets(one(service(), found)) == expected, why


@pytest.mark.parametrize(
    ("conditions", "flags"),
    [
        ({}, READY | SERVING),
        ({"ready": None, "serving": None, "terminating": None}, READY | SERVING),
        ({"ready": True}, READY | SERVING),
        ({"ready": False}, SERVING),
        ({"ready": False, "serving": False}, 0),
        ({"ready": False, "serving": True, "terminating": True}, SERVING | TERMINATING),
        ({"ready": True, "serving": True, "terminating": True}, READY | SERVING | TERMINATING),
    ],
)
def test_conditions(conditions, flags: int) -> None:
    port = one(service(), endpoint_slice(endpoints=[{"addresses": ["10.0.0.1"], "conditions": conditions}]))
    assert unpack(port.endpoints4, 4)[0].flags == flags


def test_node_and_hints() -> None:
    said = {
        "addresses": ["10.0.0.1"],
        "nodeName": "n1",
        "hints": {"forZones": [{"name": "b"}, {"name": "a"}], "forNodes": [{"name": "n1"}]},
    }
    bare = {"addresses": ["10.0.0.2"], "hints": {"forZones": []}}
    port = one(service(), endpoint_slice(endpoints=[bare, said]))
    first, second = unpack(port.endpoints4, 4, port.hint_sets)
    assert first.node == name_id("n1")
    assert first.hints == HintSet(tuple(sorted((name_id("a"), name_id("b")))), (name_id("n1"),))
    assert (second.node, second.hints) == (0, None)


def test_duplicates_are_merged_and_the_ready_one_wins() -> None:
    going = {"addresses": ["10.0.0.1"], "conditions": {"ready": False}, "hints": {"forZones": [{"name": "a"}]}}
    ready = {"addresses": ["10.0.0.1"], "nodeName": "n1"}
    here, there = endpoint_slice(endpoints=[going], name="here"), endpoint_slice(endpoints=[ready], name="there")
    expected = one(service(), endpoint_slice(endpoints=[ready]))
    assert one(service(), here, there) == expected
    assert one(service(), there, here) == expected
    assert expected.hint_sets == ()


def test_slices_may_have_different_ports_for_one_name() -> None:
    """A named targetPort that is another number in some pods."""
    old = endpoint_slice(["10.0.0.2"], name="a", ports=[{"name": "", "port": 81}])
    new = endpoint_slice(["10.0.0.1", "10.0.0.2"], name="b", ports=[{"name": "", "port": 82}])
    assert targets(one(service(), old, new)) == ["10.0.0.1:82", "10.0.0.2:81", "10.0.0.2:82"]


def test_node_ports_are_of_the_services_own_families() -> None:
    spec = {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]}
    assert dialled(one(service(**spec))) == ["CLUSTER_IP 10.96.0.1:80", "NODE_PORT 0.0.0.0:30080"]
    assert dialled(one(service(**spec, **DUAL)))[2:] == ["NODE_PORT 0.0.0.0:30080", "NODE_PORT [::]:30080"]
    assert one(service(**spec, **DUAL)).frontends[3] == Frontend(NODE_PORT, bytes(16), 30080)


def test_load_balancer_without_node_ports() -> None:
    found = service(type="LoadBalancer", allocateLoadBalancerNodePorts=False, ingress=[{"ip": "192.0.2.1"}])
    assert dialled(one(found)) == ["CLUSTER_IP 10.96.0.1:80", "LOAD_BALANCER 192.0.2.1:80"]


@pytest.mark.parametrize(
    ("ingress", "expected"),
    [
        ({"ip": "192.0.2.1"}, ["LOAD_BALANCER 192.0.2.1:80"]),
        ({"ip": "192.0.2.1", "ipMode": "VIP"}, ["LOAD_BALANCER 192.0.2.1:80"]),
        ({"ip": "192.0.2.1", "ipMode": "Proxy"}, []),
        ({"hostname": "lb.example"}, []),
        ({"ip": "2001:db8::1"}, []),  # not of the Service's families
        ({"ip": "what"}, []),
    ],
)
def test_load_balancer_ingress(ingress, expected: list[str]) -> None:
    assert dialled(one(service(type="LoadBalancer", ingress=[ingress])))[1:] == expected


def test_external_ips_are_filtered_by_family() -> None:
    found = service(externalIPs=["203.0.113.9", "2001:db8::9", "203.0.113.9"])
    assert dialled(one(found)) == ["CLUSTER_IP 10.96.0.1:80", "EXTERNAL_IP 203.0.113.9:80"]
    assert "EXTERNAL_IP [2001:db8::9]:80" in dialled(one(service(externalIPs=["2001:db8::9"], **DUAL)))


def test_source_ranges_are_trimmed_and_only_where_there_is_a_load_balancer_ip() -> None:
    ranges = {"loadBalancerSourceRanges": [" 203.0.113.0/25", "010.0.0.0/8 ", "203.0.113.0/25"]}
    found = one(service(type="LoadBalancer", ingress=[{"ip": "192.0.2.1"}], **ranges))
    assert found.source_ranges == (parse_prefix("10.0.0.0/8"), parse_prefix("203.0.113.0/25"))
    assert one(service(**ranges)).source_ranges == ()


@pytest.mark.parametrize(
    ("spec", "external_local"),
    [
        ({"type": "NodePort"}, True),
        ({"type": "LoadBalancer"}, True),
        ({"type": "ClusterIP", "externalIPs": ["203.0.113.9"]}, True),
        ({"type": "ClusterIP"}, False),
    ],
)
def test_external_traffic_policy_where_it_means_something(spec, external_local: bool) -> None:
    assert one(service(externalTrafficPolicy="Local", **spec)).external_local is external_local
    assert one(service(externalTrafficPolicy="Cluster", **spec)).external_local is False


@pytest.mark.parametrize(
    ("spec", "port"),
    [
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}, 32000),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}, 0),
        ({"type": "LoadBalancer"}, 0),
        ({"type": "NodePort", "externalTrafficPolicy": "Local"}, 0),
        ({"type": "ClusterIP", "externalTrafficPolicy": "Local", "externalIPs": ["203.0.113.9"]}, 0),
    ],
)
def test_health_check_node_port_where_it_means_something(spec, port: int) -> None:
    """As NeedsHealthCheck of kube-proxy; the API server leaves the number where it stood when a type changes."""
    found = service(healthCheckNodePort=32000, ports=[{"name": "a", "port": 80}, {"name": "b", "port": 81}], **spec)
    assert [made.health_check_node_port for made in compile_service(found, [], UNRESTRICTED).ports] == [port, port]


def test_health_check_node_port_is_granted_like_node_ports() -> None:
    found = service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=32000)
    granted = compile_service(found, [], Policy(health_check_node_ports=(PortRange(30000, 32767),)))
    assert (granted.ports[0].health_check_node_port, granted.refusals) == (32000, ())
    elsewhere = Policy(health_check_node_ports=(PortRange(40000, 40099),))
    assert compile_service(found, [], elsewhere).refusals[0].reason is Reason.NODE_PORT_RANGE
    (port,), (refusal,) = compile_service(found, [], Policy())
    assert port.health_check_node_port == 0
    assert dialled(port) == ["CLUSTER_IP 10.96.0.1:80"], "the rest of the Service goes on"
    assert (refusal.field, refusal.reason, refusal.value) == ("spec.healthCheckNodePort", Reason.NODE_PORT, "32000")


@pytest.mark.parametrize(("said", "local"), [("Local", True), ("Cluster", False), (None, False)])
def test_internal_traffic_policy(said, local: bool) -> None:
    assert one(service(internalTrafficPolicy=said)).internal_local is local


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 0),
        ({"sessionAffinity": "None"}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {}}}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 30}}}, 30),
        ({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 30}}}, 0),
    ],
)
def test_session_affinity(spec, seconds: int) -> None:
    assert one(service(**spec)).affinity_seconds == seconds


GRANTED = Policy(
    virtual_ip_ranges=(parse_prefix("10.96.0.0/16"),), external_ip_ranges=(parse_prefix("203.0.113.0/28"),)
)


def test_what_the_guard_refuses_is_left_out_and_recorded() -> None:
    found = service(
        externalIPs=["203.0.113.9", "8.8.8.8", "203.0.113.16", "169.254.169.254"],
        ports=[{"port": 80, "nodePort": 30080}],
        type="LoadBalancer",
        ingress=[{"ip": "10.0.0.1"}],
    )
    bad = endpoint_slice(["127.0.0.1", "10.0.0.1", "169.254.169.254", "what"])
    compiled = compile_service(found, [bad], GRANTED)
    assert dialled(compiled.ports[0]) == ["CLUSTER_IP 10.96.0.1:80", "EXTERNAL_IP 203.0.113.9:80"]
    assert targets(compiled.ports[0]) == ["10.0.0.1:8080"]
    assert {(said.field, said.reason): (said.value, said.count) for said in compiled.refusals} == {
        ("spec.externalIPs", Reason.EXTERNAL_IP): ("8.8.8.8", 2),
        ("spec.externalIPs", Reason.NEVER_ALLOWED): ("169.254.169.254", 1),
        ("status.loadBalancer.ingress[].ip", Reason.EXTERNAL_IP): ("10.0.0.1", 1),
        ("spec.ports[].nodePort", Reason.NODE_PORT): ("30080", 1),
        ("endpoints[].addresses", Reason.NEVER_ALLOWED): ("127.0.0.1", 2),
        ("endpoints[].addresses", Reason.MALFORMED): ("what", 1),
    }
    assert all(said.cure for said in compiled.refusals)


def test_a_virtual_ip_outside_the_operators_ranges_is_refused() -> None:
    compiled = compile_service(service(clusterIP="10.97.0.1"), [], GRANTED)
    assert compiled.ports == ()
    assert compiled.refusals[0].reason is Reason.OUTSIDE_VIRTUAL_RANGES
    assert parse_address(compiled.refusals[0].value)
