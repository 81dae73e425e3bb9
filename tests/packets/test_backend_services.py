"""What kube-proxy does for a Service, by the nftables backend, for the super cluster: pods, the host and the outside."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.packets.programmed import (
    Programmed,
    answered_by,
    cluster_ip,
    eventually,
    frontend,
    key,
    programmed,
    service,
)
from vcproxy.backend.protocol import Applied
from vcproxy.lab import (
    Client,
    Lab,
    Node,
    Outcome,
    Pod,
    Refused,
    Reply,
    TcpSession,
    TimedOut,
    Unreachable,
    netns,
    tcp_request,
    udp_request,
)
from vcproxy.model.addresses import parse_address, parse_prefix
from vcproxy.model.forwarding import Action, Masquerade
from vcproxy.model.services import FrontendKind, Protocol

pytestmark = pytest.mark.packets

VIP = {4: "10.97.0.10", 6: "fd00:97::10"}
LB = {4: "198.51.100.10", 6: "2001:db8:100::10"}
NODE_PORT = 30080
REQUEST: dict[str, Callable[..., Outcome]] = {"tcp": tcp_request, "udp": udp_request}
PROTOCOL = {"tcp": Protocol.TCP, "udp": Protocol.UDP}

families = pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
transports = pytest.mark.parametrize("transport", ["tcp", "udp"])
EXTERNAL = (FrontendKind.NODE_PORT, FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER)
external = pytest.mark.parametrize("kind", EXTERNAL, ids=["NodePort", "externalIP", "load balancer"])


@dataclass(frozen=True)
class Cluster:
    node: Node
    backend: Programmed
    client: Pod
    near: Pod
    far: Pod
    farther: Pod
    outside: Client
    other: Client

    @property
    def pods(self) -> list[Pod]:
        return [self.near, self.far, self.farther]

    def dialled(self, kind: FrontendKind, family: int) -> tuple[str, int]:
        """Where a client dials a frontend of `published`."""
        if kind is FrontendKind.CLUSTER_IP:
            return VIP[family], 80
        if kind is FrontendKind.NODE_PORT:
            return ip(self.node, family), NODE_PORT
        return LB[family], 80


@pytest.fixture(scope="module")
def world() -> Iterator[Cluster]:
    with Lab("vcp-nft-super") as lab:
        one, two = lab.node("one"), lab.node("two")
        pods = [
            one.flat_pod("client", "10.200.1.2", "fd00:200:0:1::2"),
            one.flat_pod("near", "10.200.1.3", "fd00:200:0:1::3"),
            two.flat_pod("far", "10.200.2.2", "fd00:200:0:2::2"),
            two.flat_pod("farther", "10.200.2.3", "fd00:200:0:2::3"),
        ]
        outside = lab.client("outside", "192.168.77.200", "fd77::200")
        other = lab.client("other", "192.168.77.201", "fd77::201")
        for pod in pods:
            lab.serve(pod, tcp=[80], udp=[80])
        for client in (outside, other):
            for prefix in ("198.51.100.0/24", "10.97.0.0/16", "2001:db8:100::/64", "fd00:97::/64"):
                lab.route(client, prefix, via=one)
        for prefix in ("10.97.0.0/16", "fd00:97::/64", "198.51.100.0/24", "2001:db8:100::/64"):
            lab.route(one, prefix, via=outside)
        with programmed(one) as (backend,):
            yield Cluster(one, backend, *pods, outside, other)


@pytest.fixture
def cluster(world: Cluster) -> Iterator[Cluster]:
    """The module's cluster with no services, and with a detector."""
    defaults = {
        "node_addresses": (parse_address(world.node.ip4), parse_address(world.node.ip6)),
        "local_sources": tuple(
            map(parse_prefix, ("10.200.1.0/24", "10.200.2.0/24", "fd00:200:0:1::/64", "fd00:200:0:2::/64"))
        ),
    }
    world.backend.set_node(**defaults)
    yield world
    world.backend.put("super", complete=True)


def ip(place: Pod | Node | Client, family: int) -> str:
    return place.ip4 if family == 4 else place.ip6


def published(
    *,
    inside: Action = Action.CLUSTER,
    outside: Action | None = None,
    masquerade: Masquerade = Masquerade.ALWAYS,
) -> list:  # type: ignore[type-arg]
    """All kinds of frontends of one service; the policies are of the public ones."""
    more = {"inside": inside, "outside": outside, "masquerade": masquerade}
    return [
        *cluster_ip(*VIP.values()),
        *(frontend(FrontendKind.NODE_PORT, family, NODE_PORT, **more) for family in (4, 6)),  # type: ignore[arg-type]
        *(frontend(FrontendKind.LOAD_BALANCER, address, 80, **more) for address in LB.values()),  # type: ignore[arg-type]
    ]


def seen_as(outcome: Outcome) -> str:
    """The client's address as the pod saw it."""
    assert isinstance(outcome, Reply), outcome
    return outcome.peer[0]


@families
@transports
def test_a_pod_and_the_host_reach_a_cluster_ip_of_all_endpoints(cluster: Cluster, family: int, transport: str) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), cluster.pods, protocol=PROTOCOL[transport]))
    for client in (cluster.client, cluster.node):
        found = answered_by(lambda: REQUEST[transport](client, VIP[family], 80), 30)  # noqa: B023
        assert found == {"near", "far", "farther"}


@families
def test_a_pods_source_address_is_preserved_through_a_cluster_ip(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.far]))
    assert seen_as(tcp_request(cluster.client, VIP[family], 80)) == ip(cluster.client, family)


@families
def test_an_off_cluster_client_of_a_cluster_ip_is_masqueraded(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.far]))
    assert seen_as(tcp_request(cluster.outside, VIP[family], 80)) == ip(cluster.node, family)


@families
def test_without_a_detector_nobody_is_masqueraded_on_the_way_to_a_cluster_ip(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.far]))
    cluster.backend.set_node(local_sources=None)
    assert seen_as(tcp_request(cluster.client, VIP[family], 80)) == ip(cluster.client, family)


@families
def test_masquerade_all_masquerades_pods_too(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.far]))
    cluster.backend.set_node(local_sources=None, masquerade_all=True)
    assert seen_as(tcp_request(cluster.client, VIP[family], 80)) == ip(cluster.node, family)


@families
@transports
def test_a_service_without_endpoints_refuses_pods_and_the_host(cluster: Cluster, family: int, transport: str) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values(), inside=Action.REJECT), protocol=PROTOCOL[transport]))
    for client in (cluster.client, cluster.outside):
        assert REQUEST[transport](client, VIP[family], 80) == Refused()
    # The sender of a datagram that its own kernel refuses is told so at once.
    expected = Refused() if transport == "tcp" else Unreachable("EPERM")
    assert REQUEST[transport](cluster.node, VIP[family], 80) == expected


@families
def test_internal_traffic_policy_local_without_a_local_endpoint_drops(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values(), inside=Action.DROP)))
    assert tcp_request(cluster.client, VIP[family], 80, timeout=0.5) == TimedOut()


@families
def test_internal_traffic_policy_local_stays_on_the_node(cluster: Cluster, family: int) -> None:
    frontends = cluster_ip(*VIP.values(), inside=Action.LOCAL)
    cluster.backend.put("super", service(frontends, local=[cluster.near], own=[cluster.near]))
    assert answered_by(lambda: tcp_request(cluster.client, VIP[family], 80)) == {"near"}


@families
@external
def test_external_traffic_policy_cluster_reaches_all_and_masquerades(
    cluster: Cluster, family: int, kind: FrontendKind
) -> None:
    frontends = published()
    if kind is FrontendKind.EXTERNAL_IP:
        frontends = [frontend(kind, address, 80) for address in LB.values()]
    cluster.backend.put("super", service(frontends, cluster.pods))
    for client in (cluster.outside, cluster.client, cluster.node):
        dialled = cluster.dialled(kind, family)
        assert answered_by(lambda: tcp_request(client, *dialled), 30) == {"near", "far", "farther"}  # noqa: B023
    outcomes = [tcp_request(cluster.outside, *cluster.dialled(kind, family)) for _ in range(20)]
    remote = {seen_as(outcome) for outcome in outcomes if isinstance(outcome, Reply) and outcome.pod != "near"}
    assert remote == {ip(cluster.node, family)}


@families
@external
def test_external_traffic_policy_local(cluster: Cluster, family: int, kind: FrontendKind) -> None:
    policy = {"inside": Action.CLUSTER, "outside": Action.LOCAL, "masquerade": Masquerade.HOST}
    frontends = published(**policy)  # type: ignore[arg-type]
    if kind is FrontendKind.EXTERNAL_IP:
        frontends = [frontend(kind, address, 80, **policy) for address in LB.values()]  # type: ignore[arg-type]
    cluster.backend.put("super", service(frontends, cluster.pods, local=[cluster.near], own=[cluster.near]))
    dialled = cluster.dialled(kind, family)
    assert answered_by(lambda: tcp_request(cluster.outside, *dialled)) == {"near"}
    assert seen_as(tcp_request(cluster.outside, *dialled)) == ip(cluster.outside, family)
    for client in (cluster.client, cluster.node):  # the short circuit
        assert answered_by(lambda: tcp_request(client, *dialled), 30) == {"near", "far", "farther"}  # noqa: B023
    sources = [tcp_request(cluster.client, *dialled) for _ in range(12)]
    assert {seen_as(outcome) for outcome in sources} == {ip(cluster.client, family)}


@families
@external
def test_external_traffic_policy_local_without_a_local_endpoint_drops_the_outside_only(
    cluster: Cluster, family: int, kind: FrontendKind
) -> None:
    policy = {"inside": Action.CLUSTER, "outside": Action.DROP, "masquerade": Masquerade.HOST}
    frontends = published(**policy)  # type: ignore[arg-type]
    if kind is FrontendKind.EXTERNAL_IP:
        frontends = [frontend(kind, address, 80, **policy) for address in LB.values()]  # type: ignore[arg-type]
    cluster.backend.put("super", service(frontends, [cluster.far, cluster.farther]))
    dialled = cluster.dialled(kind, family)
    assert tcp_request(cluster.outside, *dialled, timeout=0.5) == TimedOut()
    for client in (cluster.client, cluster.node):
        assert answered_by(lambda: tcp_request(client, *dialled), 20) == {"far", "farther"}  # noqa: B023


@families
@external
def test_no_endpoints_anywhere_refuses_external_clients(cluster: Cluster, family: int, kind: FrontendKind) -> None:
    frontends = published(inside=Action.REJECT)
    if kind is FrontendKind.EXTERNAL_IP:
        frontends = [frontend(kind, address, 80, inside=Action.REJECT) for address in LB.values()]
    cluster.backend.put("super", service(frontends))
    assert tcp_request(cluster.outside, *cluster.dialled(kind, family)) == Refused()


@families
def test_a_node_address_that_is_not_listed_leaves_node_ports_alone(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(published(), cluster.pods))
    cluster.backend.set_node(node_addresses=())
    assert tcp_request(cluster.outside, ip(cluster.node, family), NODE_PORT) == Refused()  # by the node's own kernel


@families
def test_load_balancer_source_ranges_gate_the_load_balancer_only(cluster: Cluster, family: int) -> None:
    ranges = (parse_prefix("192.168.77.200/32"), parse_prefix("fd77::200/128"))
    cluster.backend.put("super", service(published(), cluster.pods, source_ranges=ranges))
    assert isinstance(tcp_request(cluster.outside, LB[family], 80), Reply)
    for client in (cluster.other, cluster.client):
        assert tcp_request(client, LB[family], 80, timeout=0.5) == TimedOut()
    assert isinstance(tcp_request(cluster.other, ip(cluster.node, family), NODE_PORT), Reply)
    assert isinstance(tcp_request(cluster.client, VIP[family], 80), Reply)


@families
def test_load_balancer_source_ranges_are_widened_and_narrowed(cluster: Cluster, family: int) -> None:
    def allow(*ranges: str) -> None:
        prefixes = tuple(parse_prefix(text) for text in ranges)
        cluster.backend.put("super", service(published(), cluster.pods, source_ranges=prefixes))

    allow("192.168.77.200/32", "fd77::200/128")
    allow("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1")
    assert isinstance(tcp_request(cluster.other, LB[family], 80), Reply)
    allow("192.168.77.200/32", "fd77::200/128")
    assert isinstance(tcp_request(cluster.outside, LB[family], 80), Reply)
    assert tcp_request(cluster.other, LB[family], 80, timeout=0.5) == TimedOut()


@families
@transports
def test_a_pod_reaches_itself_through_its_service(cluster: Cluster, family: int, transport: str) -> None:
    cluster.backend.put(
        "super",
        service(cluster_ip(*VIP.values()), [cluster.near], own=[cluster.near], protocol=PROTOCOL[transport]),
    )
    assert answered_by(lambda: REQUEST[transport](cluster.near, VIP[family], 80), 5) == {"near"}


@families
def test_connections_that_are_made_outlive_their_endpoint(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.near]))
    with TcpSession(cluster.client, VIP[family], 80) as held:
        cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.far]))
        assert held.ask("still?") == "near still?"
        assert answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 5) == {"far"}


@families
@transports
def test_client_ip_affinity_holds_across_frontends_and_ends_with_the_endpoint(
    cluster: Cluster, family: int, transport: str
) -> None:
    def put(*pods: Pod) -> None:
        cluster.backend.put("super", service(published(), pods, protocol=PROTOCOL[transport], affinity_seconds=10800))

    put(*cluster.pods)
    request = REQUEST[transport]
    (held,) = answered_by(lambda: request(cluster.client, VIP[family], 80), 12)
    assert answered_by(lambda: request(cluster.client, LB[family], 80), 6) == {held}
    assert answered_by(lambda: request(cluster.client, ip(cluster.node, family), NODE_PORT), 6) == {held}
    leaving = next(pod for pod in cluster.pods if pod.name != held)
    put(*(pod for pod in cluster.pods if pod is not leaving))
    assert answered_by(lambda: request(cluster.client, VIP[family], 80), 6) == {held}  # another's leave is not ours
    put(*(pod for pod in cluster.pods if pod.name != held))
    (moved,) = answered_by(lambda: request(cluster.client, VIP[family], 80), 12)
    assert moved != held
    put(*cluster.pods)
    assert answered_by(lambda: request(cluster.client, VIP[family], 80), 12) == {moved}


@families
def test_a_client_stays_with_the_last_endpoint_when_others_come_back(cluster: Cluster, family: int) -> None:
    def put(*pods: Pod) -> None:
        cluster.backend.put("super", service(cluster_ip(*VIP.values()), pods, affinity_seconds=10800))

    put(*cluster.pods)
    (held,) = answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 6)
    last = next(pod for pod in cluster.pods if pod.name != held)
    put(last)
    assert answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 2) == {last.name}
    put(*cluster.pods)
    assert answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 12) == {last.name}


@families
def test_client_ip_affinity_expires(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), cluster.pods, affinity_seconds=1))
    assert len(answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 12)) == 1

    def asked() -> str:
        outcome = tcp_request(cluster.client, VIP[family], 80)
        assert isinstance(outcome, Reply)
        return outcome.pod

    def elsewhere() -> bool:
        time.sleep(1.2)  # longer than the timeout: any request meanwhile would renew it
        return asked() != first

    first = asked()
    eventually(elsewhere, seconds=30)


@families
def test_affinity_can_be_switched_on_and_off(cluster: Cluster, family: int) -> None:
    def put(seconds: int) -> None:
        cluster.backend.put("super", service(cluster_ip(*VIP.values()), cluster.pods, affinity_seconds=seconds))

    put(0)
    assert len(answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 30)) == 3
    put(100)
    assert len(answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 12)) == 1
    put(0)
    assert len(answered_by(lambda: tcp_request(cluster.client, VIP[family], 80), 30)) == 3


class Sender:
    """One UDP socket that keeps sending, as a DNS resolver or a log shipper does: one five-tuple for ever."""

    def __init__(self, place: Pod | Client, family: int, address: str, port: int) -> None:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self._socket = netns.socket_in(place.ns, kind, socket.SOCK_DGRAM)
        self._socket.settimeout(0.3)
        self._socket.connect((address, port))

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self) -> str:
        """Who answers a datagram; "" nobody."""
        try:
            self._socket.send(b"who?")
            return self._socket.recv(4096).decode().split('"pod": "')[1].split('"')[0]
        except OSError:
            return ""


def ended(applied: Applied, family: int) -> int:
    """Flows of a family that an update ended, as it says itself."""
    return sum(look.flows for look in applied.reconciled if look.family == family)


@families
@pytest.mark.parametrize("kind", [FrontendKind.CLUSTER_IP, *EXTERNAL[::2]], ids=["ClusterIP", "NodePort", "LB"])
def test_a_udp_flow_leaves_an_endpoint_that_goes(cluster: Cluster, family: int, kind: FrontendKind) -> None:
    cluster.backend.put("super", service(published(), [cluster.near], protocol=Protocol.UDP))
    client = cluster.client if kind is FrontendKind.CLUSTER_IP else cluster.outside
    with Sender(client, family, *cluster.dialled(kind, family)) as sender:
        assert sender.ask() == "near"
        applied = cluster.backend.put("super", service(published(), [cluster.far], protocol=Protocol.UDP))
        assert ended(applied, family) >= 1
        assert sender.ask() == "far"


@families
def test_a_udp_flow_stays_with_an_endpoint_that_still_serves(cluster: Cluster, family: int) -> None:
    both = [cluster.near, cluster.far]
    cluster.backend.put(
        "super", service(cluster_ip(*VIP.values()), [cluster.near], serving=both, protocol=Protocol.UDP)
    )
    with Sender(cluster.client, family, VIP[family], 80) as sender:
        assert sender.ask() == "near"
        applied = cluster.backend.put(
            "super", service(cluster_ip(*VIP.values()), [cluster.far], serving=both, protocol=Protocol.UDP)
        )
        assert ended(applied, family) == 0
        assert sender.ask() == "near"


@families
def test_a_udp_sender_that_began_before_its_service_is_not_stuck(cluster: Cluster, family: int) -> None:
    with Sender(cluster.client, family, VIP[family], 80) as sender:
        assert sender.ask() == ""
        frontends = cluster_ip(*VIP.values(), inside=Action.REJECT)
        cluster.backend.put("super", service(frontends, protocol=Protocol.UDP))
        assert sender.ask() == ""
        cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.near], protocol=Protocol.UDP))
        assert sender.ask() == "near"


@families
def test_when_a_udp_service_goes_its_flows_go(cluster: Cluster, family: int) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), [cluster.near], protocol=Protocol.UDP))
    with Sender(cluster.client, family, VIP[family], 80) as sender:
        assert sender.ask() == "near"
        cluster.backend.remove("super", key(protocol=Protocol.UDP))
        assert sender.ask() == ""


def test_many_endpoints_are_balanced_evenly(cluster: Cluster) -> None:
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), cluster.pods))
    counts: dict[str, int] = {}
    for _ in range(300):
        outcome = tcp_request(cluster.client, VIP[4], 80)
        assert isinstance(outcome, Reply)
        counts[outcome.pod] = counts.get(outcome.pod, 0) + 1
    # 100 each; four standard deviations of a binomial of 300 and 1/3 are 33.
    assert all(67 <= count <= 133 for count in counts.values()), counts


def test_a_pool_of_a_size_that_has_no_chain_yet(cluster: Cluster) -> None:
    pods = [
        Pod(name=f"p{n}", ns="", ip4=f"10.200.2.{n}", ip6=f"fd00:200:0:2::{n:x}", node="", device="", tenant=None)
        for n in range(2, 40)
    ]
    cluster.backend.put("super", service(cluster_ip(*VIP.values()), pods))
    eventually(lambda: isinstance(tcp_request(cluster.client, VIP[4], 80, timeout=0.1), Reply), seconds=60)
