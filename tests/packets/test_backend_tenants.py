"""Tenants on the nftables backend with real packets: overlapping addresses, overlay and flat networks, two nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.packets.programmed import Programmed, answered_by, cluster_ip, key, programmed, service
from vcproxy.lab import Lab, Node, Outcome, Pod, Refused, Reply, TcpSession, TimedOut, tcp_request, udp_request
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.services import Protocol

pytestmark = pytest.mark.packets

VIP = {4: "10.96.0.10", 6: "fd00:96::10"}
PORT = {"tcp": 80, "udp": 53}
REQUEST: dict[str, Callable[..., Outcome]] = {"tcp": tcp_request, "udp": udp_request}
PROTOCOL = {"tcp": Protocol.TCP, "udp": Protocol.UDP}
TENANTS = ("acme", "bolt")

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
transports = pytest.mark.parametrize("transport", ["tcp", "udp"])


@dataclass(frozen=True)
class Overlay:
    nodes: tuple[Node, Node]
    backends: tuple[Programmed, Programmed]
    pods: dict[tuple[str, str], Pod]

    def attach(self) -> None:
        for node, backend in zip(self.nodes, self.backends, strict=True):
            mine = {pod.device: str(pod.tenant) for pod in self.pods.values() if pod.node == node.name}
            backend.attach(interfaces=mine | {f"vx-{tenant}": tenant for tenant in TENANTS})

    def own(self, backend: Programmed, tenant: str) -> list[Pod]:
        return [pod for (uid, _), pod in self.pods.items() if uid == tenant and pod.node == backend.node.name]

    def put(self, tenant: str, *names: str) -> None:
        for backend in self.backends:
            for transport, port in PORT.items():
                backend.put(
                    tenant,
                    service(
                        cluster_ip(*VIP.values(), port=port),
                        [self.pods[tenant, name] for name in names],
                        protocol=PROTOCOL[transport],
                        port=port,
                        own=self.own(backend, tenant),
                    ),
                    ranges=(parse_prefix("10.96.0.0/16"), parse_prefix("fd00:96::/64")),
                )


@pytest.fixture(scope="module")
def overlay() -> Iterator[Overlay]:
    with Lab("vcp-nft-overlay") as lab:
        one, two = lab.node("one"), lab.node("two")
        pods = {}
        for index, name in enumerate(TENANTS):
            tenant = lab.overlay_tenant(name, vni=100 + index)
            for pod, node, number in (("client", one, 1), ("near", one, 2), ("far", two, 3)):
                pods[name, pod] = node.overlay_pod(tenant, pod, f"10.244.0.{number}", f"fd00:244::{number}")
                lab.serve(pods[name, pod], tcp=[80], udp=[53])
        with programmed(one, two) as (first, second):
            world = Overlay((one, two), (first, second), pods)
            world.attach()
            for tenant_name in TENANTS:
                world.put(tenant_name, "near", "far")
            yield world


@families
@transports
def test_tenants_with_the_same_cluster_ip_and_the_same_pod_addresses_reach_their_own(
    overlay: Overlay, family: int, transport: str
) -> None:
    for tenant in TENANTS:
        client = overlay.pods[tenant, "client"]
        found = answered_by(lambda: REQUEST[transport](client, VIP[family], PORT[transport]), 20)  # noqa: B023
        assert found == {f"{tenant}/near", f"{tenant}/far"}


@families
def test_two_tenants_hold_the_same_five_tuple_at_the_same_time(overlay: Overlay, family: int) -> None:
    clients = [overlay.pods[tenant, "client"] for tenant in TENANTS]
    with (
        TcpSession(clients[0], VIP[family], 80, source_port=40000) as acme,
        TcpSession(clients[1], VIP[family], 80, source_port=40000) as bolt,
    ):
        for _ in range(3):
            assert acme.ask("hello") == f"{acme.reply.pod} hello"
            assert bolt.ask("hello") == f"{bolt.reply.pod} hello"
        assert acme.reply.pod.startswith("acme/")
        assert bolt.reply.pod.startswith("bolt/")


@families
@transports
def test_a_pod_reaches_itself_through_its_service(overlay: Overlay, family: int, transport: str) -> None:
    near = overlay.pods["acme", "near"]
    found = answered_by(lambda: REQUEST[transport](near, VIP[family], PORT[transport]), 20)
    assert found == {"acme/near", "acme/far"}


@families
@transports
def test_a_cluster_ip_refuses_a_port_that_no_service_has_and_an_unallocated_one_stays_silent(
    overlay: Overlay, family: int, transport: str
) -> None:
    client = overlay.pods["acme", "client"]
    assert REQUEST[transport](client, VIP[family], 99) == Refused()
    unallocated = {4: "10.96.0.99", 6: "fd00:96::99"}[family]
    assert REQUEST[transport](client, unallocated, PORT[transport], timeout=0.5) == TimedOut()


@families
def test_a_change_of_one_tenant_is_no_change_of_the_other(overlay: Overlay, family: int) -> None:
    client = {tenant: overlay.pods[tenant, "client"] for tenant in TENANTS}
    with TcpSession(client["bolt"], VIP[family], 80) as held:
        overlay.put("acme", "near")
        assert answered_by(lambda: tcp_request(client["acme"], VIP[family], 80)) == {"acme/near"}
        assert answered_by(lambda: tcp_request(client["bolt"], VIP[family], 80), 20) == {"bolt/near", "bolt/far"}
        overlay.put("acme", "near", "far")
        assert held.ask("still?").endswith("still?")


def test_when_a_tenant_goes_its_flows_end_and_its_zone_serves_nobody(overlay: Overlay) -> None:
    client = overlay.pods["bolt", "client"]
    first = overlay.backends[0]
    with TcpSession(client, VIP[4], 80) as held:
        assert held.ask("here?").endswith("here?")
        first.remove_tenant("bolt")
        outcome = tcp_request(client, VIP[4], 80, timeout=0.5)
        assert not isinstance(outcome, Reply)
        assert "bolt" not in {row["tenant"] for row in first.dump()}
    overlay.put("bolt", "near", "far")
    assert answered_by(lambda: tcp_request(client, VIP[4], 80), 20) == {"bolt/near", "bolt/far"}


@pytest.fixture(scope="module")
def flat() -> Iterator[tuple[list[Programmed], dict[str, Pod]]]:
    with Lab("vcp-nft-flat") as lab:
        one, two = lab.node("one"), lab.node("two")
        pods = {}
        for number, name in enumerate(("acme/client", "acme/near", "bolt/client", "bolt/near", "super/pod"), start=2):
            pods[name] = one.flat_pod(name, f"10.200.1.{number}", f"fd00:200:0:1::{number}")
        for number, name in enumerate(("acme/far", "bolt/far"), start=2):
            pods[name] = two.flat_pod(name, f"10.200.2.{number}", f"fd00:200:0:2::{number}")
        for pod in pods.values():
            lab.serve(pod, tcp=[80], udp=[53])
        with programmed(one, two) as backends:
            for backend in backends:
                addresses = {
                    parse_address(address): name.partition("/")[0]
                    for name, pod in pods.items()
                    if pod.node == backend.node.name
                    for address in (pod.ip4, pod.ip6)
                }
                backend.attach(addresses=addresses)
                for tenant in TENANTS:
                    held = [pods[f"{tenant}/near"], pods[f"{tenant}/far"]]
                    own = [pod for pod in held if pod.node == backend.node.name]
                    for transport, port in PORT.items():
                        frontends = cluster_ip(*VIP.values(), port=port)
                        backend.put(tenant, service(frontends, held, protocol=PROTOCOL[transport], port=port, own=own))
            yield backends, pods


@families
@transports
def test_tenants_of_a_flat_network_reach_their_own_on_this_node_and_the_other(
    flat: tuple[list[Programmed], dict[str, Pod]], family: int, transport: str
) -> None:
    for tenant in TENANTS:
        client = flat[1][f"{tenant}/client"]
        found = answered_by(lambda: REQUEST[transport](client, VIP[family], PORT[transport]), 20)  # noqa: B023
        assert found == {f"{tenant}/near", f"{tenant}/far"}


@families
def test_a_flat_tenants_cluster_ip_is_nobody_elses(flat: tuple[list[Programmed], dict[str, Pod]], family: int) -> None:
    outcome = tcp_request(flat[1]["super/pod"], VIP[family], 80, timeout=0.5)
    assert not isinstance(outcome, Reply)


@families
@transports
def test_a_flat_pod_reaches_itself_through_its_service(
    flat: tuple[list[Programmed], dict[str, Pod]], family: int, transport: str
) -> None:
    near = flat[1]["acme/near"]
    found = answered_by(lambda: REQUEST[transport](near, VIP[family], PORT[transport]), 20)
    assert found == {"acme/near", "acme/far"}


def test_a_pod_that_changes_hands_dials_its_new_tenants_services(
    flat: tuple[list[Programmed], dict[str, Pod]],
) -> None:
    (first, _), pods = flat
    client = pods["super/pod"]
    everybody = {
        parse_address(address): name.partition("/")[0]
        for name, pod in pods.items()
        if pod.node == first.node.name
        for address in (pod.ip4, pod.ip6)
    }
    first.attach(addresses=everybody | {parse_address(client.ip4): "acme"})
    assert answered_by(lambda: tcp_request(client, VIP[4], 80), 20) == {"acme/near", "acme/far"}
    first.attach(addresses=everybody)
    assert not isinstance(tcp_request(client, VIP[4], 80, timeout=0.5), Reply)


def test_rejections_name_the_frontend(overlay: Overlay) -> None:
    from tests.packets.programmed import frontend
    from vcproxy.model.services import FrontendKind

    near = overlay.pods["acme", "near"]
    published = service([frontend(FrontendKind.NODE_PORT, 4, 30080)], [near], name="published")
    (rejection,) = overlay.backends[0].put("acme", published).rejections
    assert rejection.key == key("published")
    assert "IPv4 node port 30080" in rejection.reason
    overlay.backends[0].remove("acme", key("published"))
